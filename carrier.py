"""The carrier: which of a client's data channels carries the events.

Clients name the channel of their API: `oai-events`, `chat`. Some open others beside it, for files
or for themselves, and SCTP promises no order between channels: the first one to open may be any.

What it owns: the client's channels, and the choice among them.

Rules that stay true:
- A channel with a label of the call's dialect carries the events as soon as it is open, from
  another one too that did until then.
- One with any other label does so if the client speaks on it, or if no better one has opened within
  PATIENCE_S: everybody's own page names its channel as it likes.
- What comes on another channel is nobody's; what is sent goes out on the carrier alone.

Sans-IO: channels are aiortc's, or whatever has their `label`, `readyState`, `send`,
`bufferedAmount` and `remove_all_listeners`.
"""

import logging
from typing import Any

PATIENCE_S = 0.1
"""How long a channel with a strange label waits for one with a label that is known. Those that a
client opens together arrive together, but a lost packet delays one by a round trip. Whoever labels
his channel as he likes hears `session.created` so much later."""

CHANNELS_MAX = 8
"""Data channels of a session. Clients open one, two at the most; each costs some kilobytes."""

log = logging.getLogger("carrier")


class Carrier:
    """The data channels of one client."""

    def __init__(self) -> None:
        self.labels = frozenset(("oai-events",))
        """Labels that carry the events of this call's dialect; these unless its owner knows."""
        self._channels: list[Any] = []
        self._current: Any = None

    def __len__(self) -> int:
        """How many channels there are, closed ones too."""
        return len(self._channels)

    @property
    def label(self) -> str:
        """Of the channel that carries the events; empty while there is none."""
        return "" if self._current is None else str(self._current.label)

    @property
    def backlog_octets(self) -> int:
        """Octets of messages that the client has not taken yet."""
        return 0 if self._current is None else int(self._current.bufferedAmount)

    def opened(self, channel: Any) -> bool:
        """Take note of a channel. True if it carries the events from now on."""
        self._channels.append(channel)
        current = self._current
        if channel.label in self.labels:
            if current is not None and current.label in self.labels and _is_open(current):
                return False  # a second one of the same name is a mistake of the client's
        elif current is None or _is_open(current):
            return False
        self._current = channel
        return True

    def spoken(self, channel: Any) -> bool:
        """Note that the client speaks on a channel. True if that makes it the carrier."""
        if self._current is not None or channel not in self._channels:
            return False
        self._current = channel
        return True

    def waited(self) -> bool:
        """No better channel has come: the first one is it. True if there was none until now."""
        first = next(filter(_is_open, self._channels), None)
        return first is not None and self.spoken(first)

    def carries(self, channel: Any) -> bool:
        """Whether this channel is the one."""
        return channel is self._current

    def send(self, message: str) -> None:
        """Send text, if there is a carrier and it is open.

        A message larger than the client takes (a=max-message-size) is dropped and logged.
        """
        if self._current is None or not _is_open(self._current):
            return
        try:
            self._current.send(message)
        except ValueError as error:
            log.info("message not sent: %s", error)

    def clear(self) -> None:
        """Let go of all channels, and of what listens to them."""
        for channel in self._channels:
            channel.remove_all_listeners()
        self._channels.clear()
        self._current = None


def _is_open(channel: Any) -> bool:
    return bool(channel.readyState == "open")
