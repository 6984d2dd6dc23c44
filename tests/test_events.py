"""The loop of the supervisor."""

import logging
import time

import events


def test_a_call_comes_once_and_may_arrange_the_next():
    loop, heard = events.Loop(logging.getLogger("test")), []

    def call():
        heard.append(len(heard))
        if len(heard) < 3:
            loop.call_at("next", time.monotonic(), call)

    loop.call_at("next", time.monotonic() + 3600, call)
    loop.call_at("next", time.monotonic(), call)
    for _ in range(3):
        loop.turn()
    assert heard == [0, 1, 2]
