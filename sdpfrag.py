"""SDP fragments: what a client says of its ICE after the offer, read; and what it is told, written.

A fragment is the body of a PATCH: candidates found since the offer, or a new pair of credentials
for an ICE restart. It is input from a stranger: `read` ends in a `Fragment` or in a `FragmentError`
whose sentence names the line, and in nothing else, whatever the text.

Rules that stay true:
- Nothing but `a=` and `m=` lines is in a fragment. Attributes that it knows are checked; those that
  it does not know are stepped over, as the grammar has it.
- Candidates are checked for their form and counted, not kept: a client is found by its first check,
  so one whose address nobody can resolve, or that is TCP, does no harm.
- All of a fragment is about one transport: credentials that differ between its m-lines are wrong.
- Nothing of a client's fragment reaches ours but tokens.

Sans-IO. RFC 8840 section 9 https://www.rfc-editor.org/rfc/rfc8840#section-9 (the format), RFC 9725
section 4.3 https://www.rfc-editor.org/rfc/rfc9725#section-4.3 (its use), RFC 8839 section 5.1
https://www.rfc-editor.org/rfc/rfc8839#section-5.1 (candidates).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import sdp

OCTETS_MAX = 16 * 1024
"""A candidate takes 100 octets, and a laptop with several networks has thirty of them."""

CANDIDATES_MAX = 64
"""In one fragment. A client with more sends them in several, as it finds them."""

MEDIA_MAX = sdp.MEDIA_MAX
"""m-lines; with BUNDLE there is one."""

CONTENT_TYPE = "application/trickle-ice-sdpfrag"

_MID = re.compile(r"[!#-'*+\-.0-9A-Z^-~]{1,32}")  # RFC 8866 section 9: token
_MEDIA = re.compile(
    r"[A-Za-z0-9-]{1,32} [0-9]{1,5} [A-Za-z0-9/]{1,32}( [!#-'*+\-.0-9A-Z^-~]{1,32})+"
)
_CANDIDATE = re.compile(
    # foundation, component, transport, priority, address (a name, too), port, type, and the rest
    r"[A-Za-z0-9+/]{1,32} [0-9]{1,3} [!-~]{1,16} [0-9]{1,10} [!-~]{1,255} [0-9]{1,5}"
    r" typ [!-~]{1,16}( [ -~]{0,512})?"
)
_LINE = re.compile(r"[ -~\u00a0-\uffff]{2,1024}")


class FragmentError(ValueError):
    """A fragment that cannot be used. The message is a sentence for whoever sent it."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """What a client says of its ICE."""

    ufrag: str
    """Empty if it names none."""
    password: str = field(repr=False)
    """Empty if it names none."""
    bundle: tuple[str, ...]
    """The mids of its BUNDLE group; empty without."""
    media: str
    """What follows `m=` in its first m-line; empty without."""
    mid: str
    """That line's."""
    candidates: int
    ended: bool
    """True if the client says that there will be no more candidates."""


@dataclass(slots=True)
class _Found:
    """What has been read so far."""

    pairs: dict[str, str] = field(default_factory=dict)
    bundle: tuple[str, ...] = ()
    media: list[str] = field(default_factory=list)
    mids: list[str] = field(default_factory=list)
    candidates: int = 0
    ended: bool = False


def read(text: str) -> Fragment:
    """Read a fragment. Raises FragmentError, and nothing else."""
    if len(text) > OCTETS_MAX:
        raise FragmentError(f"The fragment is longer than {OCTETS_MAX} characters.")
    found = _Found()
    for number, line in enumerate(text.replace("\r\n", "\n").rstrip("\n").split("\n"), 1):
        _read_line(found, line, f"line {number} of the fragment")
    if len(found.mids) < len(found.media):
        raise FragmentError("An m-line of the fragment has no a=mid.")
    if bool(found.pairs.get("ice-ufrag")) != bool(found.pairs.get("ice-pwd")):
        raise FragmentError("The fragment has one of a=ice-ufrag and a=ice-pwd without the other.")
    return Fragment(
        ufrag=found.pairs.get("ice-ufrag", ""),
        password=found.pairs.get("ice-pwd", ""),
        bundle=found.bundle,
        media=found.media[0] if found.media else "",
        mid=found.mids[0] if found.mids else "",
        candidates=found.candidates,
        ended=found.ended,
    )


def answer(
    fragment: Fragment, ufrag: str, password: str, candidates: Sequence[tuple[str, int]]
) -> str:
    """The fragment that answers a restart: our new credentials, and where we are (as before)."""
    media = [f"m={fragment.media}", f"a=mid:{fragment.mid}"] if fragment.media else []
    lines = [
        *([f"a=group:BUNDLE {' '.join(fragment.bundle)}"] if fragment.bundle else []),
        *media,
        f"a=ice-ufrag:{ufrag}",
        f"a=ice-pwd:{password}",
    ]
    if media:  # outside an m-line there is no place for them
        lines += sdp.candidate_lines(candidates)
    return "\r\n".join(lines) + "\r\n"


# --- reading ------------------------------------------------------------------------------------


def _read_line(found: _Found, line: str, where: str) -> None:
    kind, equals, value = line[:1], line[1:2], line[2:]
    if equals != "=" or kind not in ("a", "m") or not _LINE.fullmatch(line):
        raise FragmentError(f"{where[:1].upper()}{where[1:]} is neither a=… nor m=….")
    if kind == "m":
        if len(found.mids) < len(found.media):
            raise FragmentError("An m-line of the fragment has no a=mid.")
        if len(found.media) == MEDIA_MAX:
            raise FragmentError(f"The fragment has more than {MEDIA_MAX} m-lines.")
        if not _MEDIA.fullmatch(value):
            raise FragmentError(f"The m-line in {where} is malformed.")
        found.media.append(value)
        return
    name, _, rest = value.partition(":")
    reader = _READERS.get(name)
    if reader is not None:
        reader(found, rest.strip(), where)


def _read_group(found: _Found, value: str, where: str) -> None:
    kind, *mids = value.split()[: 2 + MEDIA_MAX] or [""]
    if kind != "BUNDLE":
        return
    if found.media or found.bundle or len(mids) > MEDIA_MAX or not all(map(_MID.fullmatch, mids)):
        raise FragmentError(f"The a=group in {where} is malformed, a second one, or too late.")
    found.bundle = tuple(mids)


def _read_mid(found: _Found, value: str, where: str) -> None:
    if len(found.mids) == len(found.media) or value in found.mids or not _MID.fullmatch(value):
        raise FragmentError(f"The a=mid in {where} is malformed or not its m-line's own.")
    found.mids.append(value)


def _read_credential(name: str, characters_min: int, found: _Found, value: str, where: str) -> None:
    if not sdp.is_ice(value, characters_min):
        raise FragmentError(f"The a={name} in {where} is not {characters_min} to 256 characters.")
    if found.pairs.setdefault(name, value) != value:
        raise FragmentError(f"The a={name} in {where} differs from the one before.")


def _read_ufrag(found: _Found, value: str, where: str) -> None:
    _read_credential("ice-ufrag", 4, found, value, where)


def _read_password(found: _Found, value: str, where: str) -> None:
    _read_credential("ice-pwd", 22, found, value, where)


def _read_candidate(found: _Found, value: str, where: str) -> None:
    if not found.media:
        raise FragmentError(f"The a=candidate in {where} comes before any m-line.")
    if not _CANDIDATE.fullmatch(value):
        raise FragmentError(f"The a=candidate in {where} is malformed.")
    found.candidates += 1
    if found.candidates > CANDIDATES_MAX:
        raise FragmentError(f"The fragment has more than {CANDIDATES_MAX} candidates.")


def _read_end(found: _Found, value: str, where: str) -> None:
    found.ended = True


_READERS = {
    "group": _read_group,
    "mid": _read_mid,
    "ice-ufrag": _read_ufrag,
    "ice-pwd": _read_password,
    "candidate": _read_candidate,
    "end-of-candidates": _read_end,
}
