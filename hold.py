"""Hold: the answers to a call's first checks wait until the client has asked at a second site.

A client whose first site is lost goes on at the second one only if it has checked that while the
first was there. libwebrtc (browsers) checks a pair every 48 ms, the first site's first. Once one is
answered it prunes the others of the same network; one that it has never checked it destroys ten
seconds later, and has nothing to go on with. So a client whose round trip is shorter than that
would never know the second site: we let the first answers wait for as long as the second check
takes, and then paths.py keeps both ways open.

Rules that stay true:
- Nothing is held unless the answer names a second host of one family, nor ever after what was held
  has left: an ICE restart of a call finds its client at once, as it is in trouble by then.
- Only Binding successes are held, and our first DTLS flight, which Chromium does not take before
  it has an answer. The check has all its other effects when it comes.
- What is held leaves together, in the order in which it came: when an address of the client has
  come by a second path, else when it is due. Another address is no such sign: it may be the other
  family or network of the client at the first site, and libwebrtc prunes each network by itself. It
  shows that there are more pairs to check before a second site's, and so puts off what is due.
- A check that comes again is held once, and does not put off anything.

An answer that is so late is none to worry about: a client sends a check again after 500 ms at the
earliest (RFC 8445 section 14.3, https://www.rfc-editor.org/rfc/rfc8445#section-14.3), and may be
on the other side of the world anyway.

Sans-IO: `now` is an argument (seconds, monotonic); mux.py sets the timer.
"""

import frame
from paths import Path

HOLD_S = 0.06
"""From the first check of an address: libwebrtc's 48 ms between two checks, and some for a timer
that is late and for jitter. Calls from near begin so much later, and no other answer waits."""

ADDRESSES_MAX = 3
"""Addresses whose first check puts off what is due: two families, or two networks, and one more.
Nothing waits longer than as many times HOLD_S, which a caller does not notice."""

HELD_MAX = 8
"""Answers held for a session; one more than that, and all leave. A browser sends one in 48 ms."""


class Hold:
    """The answers of one session that wait."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        """When what is held leaves; None while nothing is."""
        self.over = False
        """All has left, and nothing is held any more."""
        self._held: list[tuple[Path, bytes]] = []
        self._seen: dict[tuple[str, int], Path] = {}  # addresses: the path each first came by

    def keep(self, path: Path, response: bytes, new: bool, now: float) -> None:
        """Hold the answer to a check that came by `path`; `new` if it is no repetition.

        `due` is to be called afterwards, which may let it go at once.
        """
        if (path, response) not in self._held:
            self._held.append((path, response))
        if self.due_at is None:
            self.due_at = now + HOLD_S
        address = frame.client(path.header)
        if len(self._held) > HELD_MAX:
            self.due_at = now
        elif not new:
            return
        elif address in self._seen:
            if self._seen[address] != path:
                self.due_at = now
        elif len(self._seen) < ADDRESSES_MAX:
            self._seen[address] = path
            self.due_at = max(self.due_at, now + HOLD_S)

    def due(self, now: float) -> list[tuple[Path, bytes]]:
        """The answers that leave now, and where each goes."""
        if self.due_at is None or now < self.due_at:
            return []
        held, self._held = self._held, []
        self.due_at, self.over = None, True
        self._seen.clear()
        return held
