"""Session descriptions: reading a client's offer, writing the answer.

An offer comes from a browser, a native library or an encoder, and is input from a stranger:
`read_offer` ends in an `Offer` or in an `OfferError` whose sentence goes into the 400, and in
nothing else, whatever the text.

Rules that stay true:
- Every m-line of the offer is answered, in its order (RFC 9429 section 5.3.1). One audio line and
  one application line are taken; more audio, and video, is answered `inactive`; a second line of
  channels, and what cannot be bundled (another protocol), is rejected with port 0.
- All lines share one transport: credentials, fingerprint and DTLS role are read from the line that
  the BUNDLE group names first among those taken (RFC 8843 section 7.3.1).
- The answer names only what the server does: one codec, one sha-256 fingerprint, all candidates
  there will ever be, no trickle, no header extensions, no `a=ice-lite` (see ice.py).
- Nothing of the offer reaches the answer but tokens, so a client cannot smuggle lines into it.

The client's candidates are not read: it is found by its first check.

Sans-IO. RFC 8866 https://www.rfc-editor.org/rfc/rfc8866 (SDP), RFC 9429
https://www.rfc-editor.org/rfc/rfc9429 (JSEP), RFC 8843 https://www.rfc-editor.org/rfc/rfc8843
(BUNDLE), RFC 8839 https://www.rfc-editor.org/rfc/rfc8839 (ICE), RFC 8842
https://www.rfc-editor.org/rfc/rfc8842 (DTLS), RFC 8841 https://www.rfc-editor.org/rfc/rfc8841
(SCTP), RFC 7587 https://www.rfc-editor.org/rfc/rfc7587 (Opus), RFC 3551 section 6
https://www.rfc-editor.org/rfc/rfc3551#section-6 (payload types that need no a=rtpmap).
"""

import enum
import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

OFFER_CHARACTERS_MAX = 64 * 1024
"""A browser's offer with audio, two video lines and data has 6 to 8 thousand characters."""

LINES_MAX = 2000
"""Lines of an offer; browsers send some 250."""

FORMATS_MAX = 128
"""In an m-line: there are 128 payload types (RFC 3550). Chromium offers 34 for its video."""

MEDIA_MAX = 16
"""m-lines. Voice clients send two to four; each is answered, so each makes the answer longer."""

SCTP_PORT = 5000
"""Our SCTP port; it means nothing inside DTLS, and 5000 is what everybody writes."""

MESSAGE_OCTETS_MAX = 262_144
"""The largest data channel message we take (a=max-message-size): what Chromium announces too."""

BITRATE, BITRATE_WIDE = 40_000, 32_000
"""What clients are asked to speak with, in bit/s, and where the model hears 16 kHz. Left alone,
libwebrtc takes 20 kb/s for that, at which libopus adds no FEC before 10 % are lost: with 2 and 5 %
PESQ is 3.2 and 2.5 (wide band), at 32 kb/s 3.8 and 3.5. For more bandwidth it takes 32, where PESQ
is 3.6 and 3.2, at 40 kb/s 3.9 and 3.5. More costs up-links, and decoding, for little.
"""

_MESSAGE_OCTETS_DEFAULT = 65_536  # RFC 8841 section 6: an offer without a=max-message-size
_TOKEN = re.compile(r"[!#-'*+\-./0-9A-Z^-~:]{1,64}")  # RFC 8866 section 9, with "/" and ":"
_PORT = re.compile(r"[0-9]{1,5}")
_FORMAT = re.compile(r"[!#-'*+\-.0-9A-Z^-~]{1,32}")
_ICE = re.compile(r"[A-Za-z0-9+/]+")  # RFC 8839 section 5.4: ice-char
_SHA256 = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){31}")
_CODEC = re.compile(r"(opus/48000/2)|(PCMU/8000(?:/1)?)|(PCMA/8000(?:/1)?)", re.IGNORECASE)
_STATIC = {"0": "PCMU/8000", "8": "PCMA/8000"}
_RTP_PROTOCOL = re.compile(r"((UDP|TCP)/TLS/)?RTP/SAVPF?")
_SCTP_PROTOCOL = re.compile(r"(UDP|TCP)/DTLS/SCTP")
_DIRECTIONS = ("sendrecv", "sendonly", "recvonly", "inactive")
_MIRRORED = dict(zip(_DIRECTIONS, ("sendrecv", "recvonly", "sendonly", "inactive"), strict=True))
_SETUPS = ("actpass", "active", "passive")


class Codec(enum.Enum):
    """What is spoken, by its name in `a=rtpmap`."""

    OPUS = "opus/48000/2"
    PCMU = "PCMU/8000"
    PCMA = "PCMA/8000"

    @property
    def clock_hz(self) -> int:
        """Of its RTP timestamps."""
        return 48_000 if self is Codec.OPUS else 8_000


class OfferError(ValueError):
    """An offer that cannot be answered. The message is a sentence for whoever sent it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One m-line of an offer, as far as the answer depends on it."""

    kind: str
    """audio, video, application, or something else."""
    protocol: str
    formats: tuple[str, ...]
    """Payload types, or `webrtc-datachannel`."""
    mid: str
    """Empty if the offer gives none."""
    direction: str
    """What the offerer wants: sendrecv, sendonly, recvonly, inactive."""
    bundled: bool
    """False: the answer rejects it."""
    mapping: str
    """The `a=rtpmap` value of the first format, empty if it has none."""
    reduced_size_rtcp: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server needs to know of an offer."""

    lines: tuple[Line, ...]
    audio: int
    """Index of the audio line that is used."""
    application: int | None
    """Index of the data channels' line; None if there is none."""
    bundle: tuple[str, ...]
    """The mids of the BUNDLE group that are taken, in its order; empty without a group."""
    ufrag: str
    password: str = field(repr=False)
    fingerprint: str
    """The client certificate's SHA-256, upper-case hexadecimal pairs and colons."""
    setup: str
    """actpass, active or passive."""
    codec: Codec
    """What is spoken in this session: Opus where it is offered, else the first that we know."""
    payload_type: int | None
    """The codec's in this session, 0 to 127; None without an audio line."""
    sends_audio: bool
    takes_audio: bool
    sctp_port: int
    message_octets_max: int
    """The largest data channel message the client takes; 0 for any size."""

    @property
    def active(self) -> bool:
        """True if the server is the DTLS client: half a round trip quicker, so wherever it may."""
        return self.setup != "active"


@dataclass(slots=True)
class _Section:
    """The attributes of the session or of one m-line, by name, in their order."""

    media: str = ""
    attributes: dict[str, list[str]] = field(default_factory=dict)

    def first(self, name: str) -> str | None:
        values = self.attributes.get(name)
        return values[0] if values else None


def read_offer(text: str) -> Offer:
    """Read an offer. Raises OfferError, and nothing else, for a text that cannot be answered."""
    session, sections = _split(text)
    if "ice-lite" in session.attributes:
        raise OfferError("The offer says a=ice-lite: the client must send the connectivity checks.")
    group = _bundle(session)
    mids: set[str] = set()
    direction = _direction(session, "sendrecv")
    lines = [
        _line(section, number, group, mids, direction) for number, section in enumerate(sections)
    ]
    _reject_more_channels(lines)
    audio, codec, payload_type = _audible(sections, lines)
    application = _first(lines, "application", lambda _: True)
    if audio is None:  # a data channel alone is no call: text goes beside speech
        raise OfferError(_nothing_to_do(lines))
    taken = {line.mid: at for at, line in enumerate(lines) if line.bundled}
    if group is None and sum(line.bundled for line in lines) > 1:
        raise OfferError("The offer has several m-lines and no a=group:BUNDLE: bundle them.")
    if "rtcp-mux" not in sections[audio].attributes:
        raise OfferError("The offer's audio has no a=rtcp-mux: RTCP must share the one port.")
    bundle = [mid for mid in dict.fromkeys(group or ()) if mid in taken]
    tagged = sections[taken[bundle[0]] if bundle else next(iter(taken.values()))]
    direction = lines[audio].direction
    channels = _Section() if application is None else sections[application]
    return Offer(
        lines=tuple(lines),
        audio=audio,
        application=application,
        bundle=tuple(bundle),
        ufrag=_ice(tagged, session, "ice-ufrag", 4),
        password=_ice(tagged, session, "ice-pwd", 22),
        fingerprint=_fingerprint(tagged, session),
        setup=_setup(tagged, session),
        codec=codec,
        payload_type=payload_type,
        sends_audio=direction in ("sendrecv", "sendonly"),
        takes_audio=direction in ("sendrecv", "recvonly"),
        sctp_port=_number(channels, "sctp-port", SCTP_PORT, 1, 0xFFFF),
        message_octets_max=_number(
            channels, "max-message-size", _MESSAGE_OCTETS_DEFAULT, 0, 1 << 63
        ),
    )


def again(before: Offer, offer: Offer) -> Offer:
    """Another offer on a connection that there is, as it has to be answered.

    Raises OfferError if it cannot be: certificate, codec and m-lines are the connection's, and so
    is who began with DTLS, which offers leave open again (RFC 8842 section 5.5).
    """
    if offer.fingerprint != before.fingerprint:
        raise OfferError("The offer's certificate is another one: that is another connection.")
    if offer.setup not in ("actpass", before.setup) and before.setup != "actpass":
        raise OfferError("The offer's a=setup contradicts the one before.")
    if offer.setup == "active" and before.active:
        raise OfferError("The offer says a=setup:active, but the server has begun with DTLS.")
    for name in ("audio", "application", "codec", "payload_type"):
        if getattr(offer, name) != getattr(before, name):
            raise OfferError(f"The offer changes the connection's {name.replace('_', ' ')}.")
    return replace(offer, setup=before.setup)


def is_ice(text: str, characters_min: int) -> bool:
    """True for a ufrag (from 4 characters) or a password (from 22): RFC 8839 section 5.4."""
    return bool(_ICE.fullmatch(text)) and characters_min <= len(text) <= 256


def answer(
    offer: Offer,
    ufrag: str,
    password: str,
    *,
    fingerprint: str,
    candidates: Sequence[tuple[str, int]],
    ssrc: int,
    session_id: int,
    rate_hz: int = 16_000,
) -> str:
    """The answer to an offer.

    `fingerprint` is the server certificate's SHA-256; `candidates` are the relays' public addresses
    in order of preference, at least one; `ssrc` is that of the audio sent; `session_id` is a number
    for the o-line; `rate_hz` is the rate the backend hears at, which the client's encoder need not
    exceed.
    """
    transport = [
        f"a=ice-ufrag:{ufrag}",
        f"a=ice-pwd:{password}",
        f"a=fingerprint:sha-256 {fingerprint}",
        f"a=setup:{'active' if offer.active else 'passive'}",
        *candidate_lines(candidates),
    ]
    host, port = candidates[0]
    version = ipaddress.ip_address(host).version
    text = [
        "v=0",
        f"o=- {session_id} 2 IN IP4 0.0.0.0",
        "s=-",
        "t=0 0",
        *([f"a=group:BUNDLE {' '.join(offer.bundle)}"] if offer.bundle else []),
        "a=msid-semantic:WMS *",
    ]
    for at, line in enumerate(offer.lines):
        mid = [f"a=mid:{line.mid}"] if line.mid else []
        if not line.bundled:
            text += [f"m={line.kind} 0 {line.protocol} {line.formats[0]}", "c=IN IP4 0.0.0.0", *mid]
            continue
        if at == offer.application:
            formats, body = line.formats[0], _channels()
        elif at == offer.audio:
            formats, body = str(offer.payload_type), _audio(offer, line, ssrc, rate_hz)
        else:
            formats, body = line.formats[0], _inactive(line)
        text += [f"m={line.kind} {port} {line.protocol} {formats}", f"c=IN IP{version} {host}"]
        text += [*mid, *body, *transport]
    return "\r\n".join(text) + "\r\n"


def candidate_lines(candidates: Sequence[tuple[str, int]]) -> list[str]:
    """Our candidates in order of preference, and that there will be no more."""
    lines = []
    for at, (host, port) in enumerate(candidates):
        # RFC 8445 section 5.1.2.1: type preference 126 (host), then the order given, component 1.
        priority = 126 << 24 | 65535 - at << 8 | 255
        lines.append(f"a=candidate:{at + 1} 1 udp {priority} {host} {port} typ host")
    return [*lines, "a=end-of-candidates"]


# --- writing ----------------------------------------------------------------------------------


def _audio(offer: Offer, line: Line, ssrc: int, rate_hz: int) -> list[str]:
    body = [
        f"a={_MIRRORED[line.direction]}",
        "a=rtcp-mux",
        f"a=rtpmap:{offer.payload_type} {offer.codec.value}",
    ]
    if offer.codec is Codec.OPUS:
        bitrate = BITRATE_WIDE if rate_hz <= 16_000 else BITRATE
        # RFC 7587 section 6.1: what we would like to receive. FEC in band mends single losses; mono
        # at the rate the model hears costs the client, the network and us less.
        body.append(
            f"a=fmtp:{offer.payload_type} minptime=10;useinbandfec=1;stereo=0;sprop-stereo=0"
            f";maxplaybackrate={rate_hz};maxaveragebitrate={bitrate}"
        )
    body.append("a=ptime:20")
    if line.reduced_size_rtcp:
        body.append("a=rtcp-rsize")
    if offer.takes_audio:
        # Clients play `event.streams[0]`: without a stream id there is none (RFC 8830).
        body += ["a=msid:earshot audio", f"a=ssrc:{ssrc} cname:earshot"]
    return body


def _channels() -> list[str]:
    return [f"a=sctp-port:{SCTP_PORT}", f"a=max-message-size:{MESSAGE_OCTETS_MAX}"]


def _inactive(line: Line) -> list[str]:
    body = ["a=inactive", "a=rtcp-mux"]
    return [*body, f"a=rtpmap:{line.formats[0]} {line.mapping}"] if line.mapping else body


# --- reading ----------------------------------------------------------------------------------


def _split(text: str) -> tuple[_Section, list[_Section]]:
    """The session's attributes and the m-lines with theirs."""
    if len(text) > OFFER_CHARACTERS_MAX:
        raise OfferError(f"The offer is longer than {OFFER_CHARACTERS_MAX} characters.")
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > LINES_MAX:
        raise OfferError(f"The offer has more than {LINES_MAX} lines.")
    if lines[0].strip() != "v=0":
        raise OfferError("The offer does not begin with v=0: it is no session description.")
    session = _Section()
    sections: list[_Section] = []
    for line in lines:
        kind, equals, value = line.strip().partition("=")
        if kind == "m" and equals:
            if len(sections) == MEDIA_MAX:
                raise OfferError(f"The offer has more than {MEDIA_MAX} m-lines.")
            sections.append(_Section(value))
        elif kind == "a" and equals:
            name, _, rest = value.partition(":")
            where = sections[-1] if sections else session
            where.attributes.setdefault(name, []).append(rest.strip())
    if not sections:
        raise OfferError("The offer has no m-line: there is nothing to answer.")
    return session, sections


def _bundle(session: _Section) -> list[str] | None:
    """The mids of the first BUNDLE group; None without one."""
    for value in session.attributes.get("group", []):
        match value.split():
            case ["BUNDLE", *mids]:
                return mids
    return None


def _line(
    section: _Section, number: int, group: list[str] | None, mids: set[str], direction: str
) -> Line:
    """One m-line, checked for all that the answer repeats of it. `direction` is the session's."""
    where = f"m-line {number + 1}"
    words = section.media.split()
    if len(words) < 4 or not _PORT.fullmatch(words[1]):
        raise OfferError(
            f"The offer's {where} is malformed: m=MEDIA PORT PROTOCOL FORMAT expected."
        )
    kind, port, protocol, *formats = words
    if len(formats) > FORMATS_MAX:
        raise OfferError(f"The offer's {where} has more than {FORMATS_MAX} formats.")
    if not all(map(_TOKEN.fullmatch, (kind, protocol))) or not all(map(_FORMAT.fullmatch, formats)):
        raise OfferError(f"The offer's {where} has characters that SDP does not allow there.")
    mid = section.first("mid") or ""  # a line on its own may come without (RFC 8843 section 7.1)
    if mid and (not _FORMAT.fullmatch(mid) or mid in mids):
        raise OfferError(f"The offer's {where} has an a=mid that is malformed or not its own.")
    mids.add(mid)
    media = kind in ("audio", "video") and _RTP_PROTOCOL.fullmatch(protocol)
    channels = kind == "application" and _SCTP_PROTOCOL.fullmatch(protocol)
    if channels and formats[0] != "webrtc-datachannel":
        channels = None
    wanted = int(port) != 0 or "bundle-only" in section.attributes
    mapping = _mappings(section).get(formats[0], "")
    return Line(
        kind=kind,
        protocol=protocol,
        formats=tuple(formats),
        mid=mid,
        direction=_direction(section, direction),
        bundled=bool(media or channels) and wanted and (group is None or mid in group),
        mapping=mapping if _TOKEN.fullmatch(mapping) else "",
        reduced_size_rtcp="rtcp-rsize" in section.attributes,
    )


def _direction(section: _Section, default: str) -> str:
    return next((each for each in _DIRECTIONS if each in section.attributes), default)


def _reject_more_channels(lines: list[Line]) -> None:
    """There is one SCTP association on a transport (RFC 8841 section 8): the first line's."""
    channels = [at for at, line in enumerate(lines) if line.kind == "application" and line.bundled]
    for at in channels[1:]:
        lines[at] = replace(lines[at], bundled=False)


def _mappings(section: _Section) -> dict[str, str]:
    """What the m-line's payload types stand for; the first line of each counts."""
    pairs = (value.partition(" ") for value in reversed(section.attributes.get("rtpmap", [])))
    return {number: mapping.strip() for number, _, mapping in pairs}


def _audible(
    sections: Sequence[_Section], lines: Sequence[Line]
) -> tuple[int | None, Codec, int | None]:
    """The audio line that is used, its codec and that one's payload type: Opus in any line, else
    the first of G.711. None for both numbers if there is neither."""
    found: dict[bool, tuple[int, Codec, int]] = {}
    for at, (section, line) in enumerate(zip(sections, lines, strict=True)):
        if line.kind == "audio" and line.bundled:
            mappings = _mappings(section)
            for payload_type in line.formats:
                codec = _codec(mappings, payload_type)
                if codec is not None:
                    found.setdefault(codec is Codec.OPUS, (at, codec, int(payload_type)))
    return found.get(True) or found.get(False) or (None, Codec.OPUS, None)


def _codec(mappings: dict[str, str], payload_type: str) -> Codec | None:
    """What a payload type stands for; None if that is none of ours."""
    if not (payload_type.isascii() and payload_type.isdecimal() and int(payload_type) <= 127):
        return None
    mapping = mappings.get(payload_type) or _STATIC.get(payload_type, "")
    match = _CODEC.fullmatch(mapping)
    return None if match is None else list(Codec)[int(match.lastindex or 1) - 1]


def _first(lines: Sequence[Line], kind: str, suits: Callable[[int], bool]) -> int | None:
    for at, line in enumerate(lines):
        if line.kind == kind and line.bundled and suits(at):
            return at
    return None


def _nothing_to_do(lines: Sequence[Line]) -> str:
    audio = [line for line in lines if line.kind == "audio"]
    if any(line.bundled for line in audio):
        return "The offer's audio has none of opus/48000/2, PCMU/8000 and PCMA/8000 (a=rtpmap)."
    if audio:
        return "The offer's audio is switched off, outside the BUNDLE group, or not DTLS-SRTP."
    return "The offer has no audio: there is nothing to hear and nothing to say."


def _inherited(section: _Section, session: _Section, name: str) -> list[str]:
    """An attribute's values: the m-line's, else the session's."""
    return section.attributes.get(name) or session.attributes.get(name) or []


def _ice(section: _Section, session: _Section, name: str, characters_min: int) -> str:
    values = _inherited(section, session, name)
    if not values:
        raise OfferError(f"The offer has no a={name}.")
    if not is_ice(values[0], characters_min):
        raise OfferError(f"The offer's a={name} is not {characters_min} to 256 ICE characters.")
    return values[0]


def _fingerprint(section: _Section, session: _Section) -> str:
    """The SHA-256 fingerprint; others beside it are left aside (RFC 8122 section 5)."""
    found = set()
    for value in _inherited(section, session, "fingerprint"):
        algorithm, _, digest = value.partition(" ")
        if algorithm.lower() == "sha-256":
            if not _SHA256.fullmatch(digest.strip()):
                raise OfferError("The offer's a=fingerprint:sha-256 is not 32 hexadecimal pairs.")
            found.add(digest.strip().upper())
    if not found:
        raise OfferError("The offer has no a=fingerprint:sha-256.")
    if len(found) > 1:
        raise OfferError("The offer has several a=fingerprint:sha-256 that differ.")
    return found.pop()


def _setup(section: _Section, session: _Section) -> str:
    values = _inherited(section, session, "setup")
    if not values:
        raise OfferError("The offer has no a=setup.")
    if values[0] not in _SETUPS:
        raise OfferError("The offer's a=setup is not actpass, active or passive.")
    return values[0]


def _number(section: _Section, name: str, default: int, least: int, most: int) -> int:
    value = section.first(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 20):
        raise OfferError(f"The offer's a={name} is not a number.")
    if not least <= int(value) <= most:
        raise OfferError(f"The offer's a={name} is not between {least} and {most}.")
    return int(value)
