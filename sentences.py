"""Sentences: the text of a reply, cut as it comes.

Models write word by word; some clients show sentences, and mark each as new, and as spoken once it
has been heard. So a reply's text is kept here until it has been played.

What it owns: where a sentence ends, and which of a reply's sentences its client knows.

Rules that stay true:
- Nothing of a text is lost but white space around sentences.
- A full stop with nothing after it ends nothing yet: it may be a decimal point.
- What is kept is bounded, whatever comes.

Sans-IO.
"""

import re

SENTENCE_CHARACTERS_MAX = 1_000
"""What has no end by then is passed on as a sentence: a reply without punctuation."""

SENTENCES_MAX = 256
"""Of one reply: half an hour of talk. Those beyond are told, but not remembered."""

_END = re.compile(r"""[.!?…]["'”’»)\]]*\s+|[。！？]["”’」』）]*\s*|\n+""")


class Sentences:
    """The text of one reply."""

    def __init__(self, *, spoken: bool) -> None:
        self.spoken = spoken
        """Whether it is heard, and not only read."""
        self.told: list[tuple[int, str]] = []
        """Those that the client knows, by their numbers."""
        self._rest = ""

    def add(self, text: str) -> list[str]:
        """The sentences that this piece of text ends."""
        self._rest += text
        found, at = [], 0
        for end in _END.finditer(self._rest):
            found.append(self._rest[at : end.end()].strip())
            at = end.end()
        self._rest = self._rest[at:]
        if len(self._rest) > SENTENCE_CHARACTERS_MAX:
            found += self.end()
        return [each for each in found if each]

    def end(self) -> list[str]:
        """What is left, as the last sentence."""
        rest, self._rest = self._rest, ""
        whole = (
            rest[at : at + SENTENCE_CHARACTERS_MAX].strip()
            for at in range(0, len(rest), SENTENCE_CHARACTERS_MAX)
        )
        return [each for each in whole if each]

    def tell(self, number: int, text: str) -> None:
        """Note that the client knows a sentence by this number."""
        if len(self.told) < SENTENCES_MAX:
            self.told.append((number, text))
