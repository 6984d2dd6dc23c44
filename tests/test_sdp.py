"""Offers as clients send them, offers that are wrong, and what the answer says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdp

FINGERPRINT = ":".join(["AB"] * 32)

SESSION = ["v=0", "o=- 1 2 IN IP4 127.0.0.1", "s=-", "t=0 0"]
TRANSPORT = [
    "a=ice-ufrag:abcd",
    "a=ice-pwd:0123456789012345678901",
    f"a=fingerprint:sha-256 {FINGERPRINT}",
    "a=setup:actpass",
]
AUDIO = [
    "m=audio 9 UDP/TLS/RTP/SAVPF 111 63 0",
    "c=IN IP4 0.0.0.0",
    "a=mid:0",
    "a=sendrecv",
    "a=rtcp-mux",
    "a=rtcp-rsize",
    "a=rtpmap:111 opus/48000/2",
    "a=fmtp:111 minptime=10;useinbandfec=1",
    "a=rtpmap:63 red/48000/2",
    *TRANSPORT,
]
VIDEO = [
    "m=video 9 UDP/TLS/RTP/SAVPF 96 97",
    "a=mid:1",
    "a=sendrecv",
    "a=rtcp-mux",
    "a=rtpmap:96 VP8/90000",
    *TRANSPORT,
]
DATA = [
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
    "a=mid:2",
    "a=sctp-port:5001",
    "a=max-message-size:100000",
    *TRANSPORT,
]
BUNDLE = ["a=group:BUNDLE 0 1 2"]
BROWSER = [*SESSION, *BUNDLE, *AUDIO, *VIDEO, *DATA]


def text(lines: list[str], end: str = "\r\n") -> str:
    return end.join([*lines, ""])


def without(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if not line.startswith(start)]


def changed(lines: list[str], start: str, new: str) -> list[str]:
    return [new if line.startswith(start) else line for line in lines]


def answer(offer: sdp.Offer, candidates: list[tuple[str, int]] | None = None) -> list[str]:
    return sdp.answer(
        offer,
        "APeT9ekG4r6OlO9+HGsokz4",
        "Z4K/XErQpQxJ6rgyZhiW2+BN",
        fingerprint="CD:EF",
        candidates=candidates or [("203.0.113.5", 3478)],
        ssrc=7,
        session_id=42,
    ).split("\r\n")


def media(lines: list[str]) -> list[list[str]]:
    """The answer's m-lines with what follows each."""
    starts = [at for at, line in enumerate(lines) if line.startswith("m=")]
    return [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_browsers_offer(end: str) -> None:
    offer = sdp.read_offer(text(BROWSER, end))
    assert (offer.audio, offer.application) == (0, 2)
    assert offer.bundle == ("0", "1", "2")
    assert offer.ufrag == "abcd"
    assert offer.password == "0123456789012345678901"
    assert offer.fingerprint == FINGERPRINT
    assert offer.setup == "actpass"
    assert offer.active
    assert offer.payload_type == 111
    assert offer.sends_audio
    assert offer.takes_audio
    assert offer.sctp_port == 5001
    assert offer.message_octets_max == 100_000
    assert "0123456789012345678901" not in repr(offer)


def test_the_answer_to_a_browser() -> None:
    lines = answer(sdp.read_offer(text(BROWSER)), [("203.0.113.5", 3478), ("2001:db8::5", 3478)])
    assert lines[:5] == ["v=0", "o=- 42 2 IN IP4 0.0.0.0", "s=-", "t=0 0", "a=group:BUNDLE 0 1 2"]
    audio, video, data = media(lines)
    assert audio[:2] == ["m=audio 3478 UDP/TLS/RTP/SAVPF 111", "c=IN IP4 203.0.113.5"]
    assert "a=msid:earshot audio" in audio
    assert "a=ssrc:7 cname:earshot" in audio
    assert "a=sendrecv" in audio
    assert "a=rtcp-rsize" in audio
    fmtp = (
        "minptime=10;useinbandfec=1;stereo=0;sprop-stereo=0;maxplaybackrate=16000"
        ";maxaveragebitrate=32000"
    )
    assert f"a=fmtp:111 {fmtp}" in audio
    assert video[0] == "m=video 3478 UDP/TLS/RTP/SAVPF 96"
    assert {"a=mid:1", "a=inactive", "a=rtpmap:96 VP8/90000"} <= set(video)
    assert data[0] == "m=application 3478 UDP/DTLS/SCTP webrtc-datachannel"
    assert {"a=sctp-port:5000", "a=max-message-size:262144"} <= set(data)
    for section in (audio, video, data):
        assert section.count("a=fingerprint:sha-256 CD:EF") == 1
        assert sum(line.startswith("a=fingerprint") for line in section) == 1
        assert "a=setup:active" in section
        assert "a=candidate:1 1 udp 2130706431 203.0.113.5 3478 typ host" in section
        assert "a=candidate:2 1 udp 2130706175 2001:db8::5 3478 typ host" in section
        assert "a=end-of-candidates" in section
    everything = "\n".join(lines)
    assert "ice-lite" not in everything
    assert "trickle" not in everything
    assert "extmap" not in everything


def test_an_offer_of_chromium_as_it_came() -> None:
    """Microphone, two video lines and a data channel, as some voice SDKs offer them."""
    path = Path(__file__).with_name("data") / "chromium-156-offer.sdp"
    offer = sdp.read_offer(path.read_bytes().decode())
    assert offer.bundle == ("0", "1", "2", "3")
    assert (offer.audio, offer.application, offer.payload_type) == (0, 3, 111)
    assert offer.setup == "actpass"
    assert offer.message_octets_max == 262_144
    audio, video, more, data = media(answer(offer))
    assert "a=sendrecv" in audio
    assert "a=inactive" in video
    assert "a=inactive" in more
    assert data[0].startswith("m=application 3478 ")


@pytest.mark.parametrize(
    ("offered", "answered"), [("actpass", "active"), ("passive", "active"), ("active", "passive")]
)
def test_dtls_roles(offered: str, answered: str) -> None:
    lines = changed([*SESSION, *AUDIO], "a=setup", f"a=setup:{offered}")
    offer = sdp.read_offer(text(lines))
    assert offer.active == (answered == "active")
    assert f"a=setup:{answered}" in answer(offer)


@pytest.mark.parametrize(
    ("offered", "answered"),
    [("sendonly", "recvonly"), ("recvonly", "sendonly"), ("inactive", "inactive")],
)
def test_directions_are_mirrored(offered: str, answered: str) -> None:
    offer = sdp.read_offer(text(changed([*SESSION, *AUDIO], "a=sendrecv", f"a={offered}")))
    lines = answer(offer)
    assert f"a={answered}" in lines
    assert ("a=msid:earshot audio" in lines) == (answered == "sendonly")
    assert offer.sends_audio == (offered == "sendonly")
    assert offer.takes_audio == (offered == "recvonly")


def test_a_single_line_needs_neither_mid_nor_group() -> None:
    offer = sdp.read_offer(text(without([*SESSION, *AUDIO], "a=mid")))
    assert offer.bundle == ()
    lines = answer(offer)
    assert not any(line.startswith(("a=mid", "a=group")) for line in lines)


def test_transport_attributes_may_stand_in_the_session() -> None:
    audio = [line for line in AUDIO if line not in TRANSPORT]
    assert sdp.read_offer(text([*SESSION, *TRANSPORT, *audio])).ufrag == "abcd"


def test_the_group_says_whose_transport_counts() -> None:
    data = changed(DATA, "a=ice-ufrag", "a=ice-ufrag:efgh")
    offer = sdp.read_offer(text([*SESSION, "a=group:BUNDLE 2 0", *AUDIO, *data]))
    assert offer.ufrag == "efgh"
    assert offer.bundle == ("2", "0")


def test_a_second_audio_line_is_inactive() -> None:
    second = changed(AUDIO, "a=mid", "a=mid:9")
    offer = sdp.read_offer(text([*SESSION, "a=group:BUNDLE 0 9", *AUDIO, *second]))
    assert offer.audio == 0
    first, other = media(answer(offer))
    assert "a=sendrecv" in first
    assert "a=inactive" in other


@pytest.mark.parametrize(
    "line",
    ["m=text 9 UDP/TLS/RTP/SAVPF 98", "m=video 9 RTP/AVP 98", "m=application 9 DTLS/SCTP 5000"],
)
def test_what_cannot_be_bundled_is_rejected_with_port_0(line: str) -> None:
    odd = [line, "a=mid:7", *TRANSPORT]
    offer = sdp.read_offer(text([*SESSION, "a=group:BUNDLE 0 7", *AUDIO, *odd]))
    assert offer.bundle == ("0",)
    kind, _, protocol, form = line.split()
    rejected = media(answer(offer))[1]
    assert rejected[:3] == [f"{kind} 0 {protocol} {form}", "c=IN IP4 0.0.0.0", "a=mid:7"]


def test_a_group_that_names_nothing_is_no_group() -> None:
    offer = sdp.read_offer(text([*SESSION, "a=group:", *AUDIO]))
    assert offer.bundle == ()


def test_a_line_that_is_switched_off_stays_off() -> None:
    video = changed(VIDEO, "m=video", "m=video 0 UDP/TLS/RTP/SAVPF 96")
    offer = sdp.read_offer(text([*SESSION, *BUNDLE, *AUDIO, *video, *DATA]))
    assert offer.bundle == ("0", "2")
    assert media(answer(offer))[1][0] == "m=video 0 UDP/TLS/RTP/SAVPF 96"


def test_bundle_only_lines_are_not_off() -> None:
    video = [*changed(VIDEO, "m=video", "m=video 0 UDP/TLS/RTP/SAVPF 96"), "a=bundle-only"]
    assert sdp.read_offer(text([*SESSION, *BUNDLE, *AUDIO, *video, *DATA])).lines[1].bundled


def test_other_fingerprints_are_left_aside() -> None:
    more = ["a=fingerprint:sha-512 00:11", "a=fingerprint:SHA-256 " + FINGERPRINT.lower()]
    assert sdp.read_offer(text([*SESSION, *AUDIO, *more])).fingerprint == FINGERPRINT


ONE = [*SESSION, *AUDIO]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([""], "The offer does not begin with v=0: it is no session description."),
        (SESSION, "The offer has no m-line: there is nothing to answer."),
        (
            [*SESSION, "a=ice-lite", *AUDIO],
            "The offer says a=ice-lite: the client must send the connectivity checks.",
        ),
        (without(ONE, "a=ice-ufrag"), "The offer has no a=ice-ufrag."),
        (without(ONE, "a=ice-pwd"), "The offer has no a=ice-pwd."),
        (
            changed(ONE, "a=ice-pwd", "a=ice-pwd:short"),
            "The offer's a=ice-pwd is not 22 to 256 ICE characters.",
        ),
        (
            changed(ONE, "a=ice-ufrag", "a=ice-ufrag:a b:c"),
            "The offer's a=ice-ufrag is not 4 to 256 ICE characters.",
        ),
        (without(ONE, "a=fingerprint"), "The offer has no a=fingerprint:sha-256."),
        (
            changed(ONE, "a=fingerprint", "a=fingerprint:sha-256 00:11"),
            "The offer's a=fingerprint:sha-256 is not 32 hexadecimal pairs.",
        ),
        (
            [*ONE, "a=fingerprint:sha-256 " + ":".join(["00"] * 32)],
            "The offer has several a=fingerprint:sha-256 that differ.",
        ),
        (without(ONE, "a=setup"), "The offer has no a=setup."),
        (
            changed(ONE, "a=setup", "a=setup:holdconn"),
            "The offer's a=setup is not actpass, active or passive.",
        ),
        (
            without(ONE, "a=rtcp-mux"),
            "The offer's audio has no a=rtcp-mux: RTCP must share the one port.",
        ),
        (
            changed(without(ONE, "a=rtpmap:111"), "m=audio", "m=audio 9 UDP/TLS/RTP/SAVPF 111 63"),
            "The offer's audio has none of opus/48000/2, PCMU/8000 and PCMA/8000 (a=rtpmap).",
        ),
        (
            changed(ONE, "m=audio", "m=audio 9 RTP/AVP 111"),
            "The offer's audio is switched off, outside the BUNDLE group, or not DTLS-SRTP.",
        ),
        (
            [*SESSION, *VIDEO],
            "The offer has no audio: there is nothing to hear and nothing to say.",
        ),
        (
            [*SESSION, *DATA],
            "The offer has no audio: there is nothing to hear and nothing to say.",
        ),
        (
            changed(BROWSER, "m=audio", "m=audio 9 UDP/TLS/RTP/SAVPF 96"),
            "The offer's audio has none of opus/48000/2, PCMU/8000 and PCMA/8000 (a=rtpmap).",
        ),
        (
            [*SESSION, *AUDIO, *DATA],
            "The offer has several m-lines and no a=group:BUNDLE: bundle them.",
        ),
        (
            changed(ONE, "m=audio", "m=audio nine UDP/TLS/RTP/SAVPF 111"),
            "The offer's m-line 1 is malformed: m=MEDIA PORT PROTOCOL FORMAT expected.",
        ),
        (
            changed(ONE, "m=audio", "m=audio 9 UDP/TLS/RTP/SAVPF 1\x0011"),
            "The offer's m-line 1 has characters that SDP does not allow there.",
        ),
        (
            [*SESSION, *BUNDLE, *AUDIO, *changed(DATA, "a=mid", "a=mid:0")],
            "The offer's m-line 2 has an a=mid that is malformed or not its own.",
        ),
        (
            changed(BROWSER, "a=sctp-port", "a=sctp-port:99999"),
            "The offer's a=sctp-port is not between 1 and 65535.",
        ),
        (
            changed(BROWSER, "a=max-message-size", "a=max-message-size:lots"),
            "The offer's a=max-message-size is not a number.",
        ),
        (
            [*ONE, "a=" + "x" * sdp.OFFER_CHARACTERS_MAX],
            "The offer is longer than 65536 characters.",
        ),
        ([*ONE, *[""] * sdp.LINES_MAX], "The offer has more than 2000 lines."),
        ([*SESSION, *["m=audio 0 RTP/AVP 0"] * 17], "The offer has more than 16 m-lines."),
        (
            # Each format times each a=rtpmap would be seconds of work.
            [
                *changed(ONE, "m=audio", "m=audio 9 RTP/SAVPF" + " 1" * 129),
                *["a=rtpmap:2 x/1"] * 99,
            ],
            "The offer's m-line 1 has more than 128 formats.",
        ),
    ],
)
def test_what_is_wrong_is_said(lines: list[str], sentence: str) -> None:
    with pytest.raises(sdp.OfferError) as raised:
        sdp.read_offer(text(lines))
    assert str(raised.value) == sentence


def test_no_line_can_be_smuggled_into_the_answer() -> None:
    hostile = changed(BROWSER, "a=mid:1", "a=mid:1\ra=ice-lite")
    with pytest.raises(sdp.OfferError):
        sdp.read_offer(text(hostile))
    mapping = changed(BROWSER, "a=rtpmap:96", "a=rtpmap:96 VP8/90000 \x0ba=ice-lite")
    assert not any("ice-lite" in line for line in answer(sdp.read_offer(text(mapping))))


@given(
    st.lists(
        st.one_of(
            st.sampled_from(BROWSER),
            st.tuples(st.sampled_from(BROWSER), st.text(max_size=8)).map("".join),
            st.text(max_size=40),
        ),
        max_size=60,
    )
)
def test_any_text_is_an_offer_or_an_error(lines: list[str]) -> None:
    try:
        offer = sdp.read_offer(text(["v=0", *lines]))
    except sdp.OfferError:
        return
    assert len(media(answer(offer))) == len(offer.lines)


@given(st.data())
def test_a_browsers_offer_with_anything_changed(data: st.DataObject) -> None:
    whole = text(BROWSER)
    at = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 30))
    try:
        offer = sdp.read_offer(whole[:at] + data.draw(st.text(max_size=30)) + whole[at + length :])
    except sdp.OfferError:
        return
    answer(offer)


def test_another_offer_on_the_same_connection_is_answered_in_the_same_role() -> None:
    before = sdp.read_offer(
        text([*SESSION, "a=group:BUNDLE 0", *AUDIO]).replace("actpass", "active")
    )
    assert not before.active
    offer = sdp.read_offer(text([*SESSION, "a=group:BUNDLE 0", *AUDIO]))
    assert not sdp.again(before, offer).active
    assert sdp.again(offer, offer) == offer


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        (FINGERPRINT[:6], "00:00:", "certificate"),
        ("a=setup:actpass", "a=setup:active", "setup"),
        ("111", "112", "payload type"),
    ],
)
def test_an_offer_of_another_connection_is_none_on_this_one(old: str, new: str, wrong: str) -> None:
    described = text([*SESSION, "a=group:BUNDLE 0", *AUDIO])
    before = sdp.read_offer(described)
    assert old in described
    with pytest.raises(sdp.OfferError, match=wrong):
        sdp.again(before, sdp.read_offer(described.replace(old, new, 10)))
