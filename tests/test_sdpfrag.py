"""Fragments as clients send them, fragments that are wrong, and what the answer says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdpfrag

PAIR = ["a=ice-ufrag:EsAw", "a=ice-pwd:P2uYro0UCOQ4zxjKXaWCBui1"]
LINE = ["m=audio 9 UDP/TLS/RTP/SAVPF 111", "a=mid:0"]
FOUND = [
    "a=candidate:1387637174 1 udp 2122260223 192.0.2.1 61764 typ host generation 0 ufrag EsAw"
    " network-id 1",
    "a=candidate:3471623853 1 udp 2122194687 4fa1-77.local 61765 typ host generation 0",
    "a=candidate:473322822 1 tcp 1518280447 192.0.2.1 9 typ host tcptype active",
]
FULL = ["a=ice-options:trickle ice2", "a=group:BUNDLE 0 1", *LINE, *PAIR, *FOUND]


def text(lines: list[str], end: str = "\r\n") -> str:
    return end.join([*lines, ""])


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_what_a_browsers_client_trickles(end: str) -> None:
    fragment = sdpfrag.read(text([*FULL, "a=end-of-candidates"], end))
    assert (fragment.ufrag, fragment.password) == ("EsAw", "P2uYro0UCOQ4zxjKXaWCBui1")
    assert fragment.bundle == ("0", "1")
    assert (fragment.media, fragment.mid) == ("audio 9 UDP/TLS/RTP/SAVPF 111", "0")
    assert (fragment.candidates, fragment.ended) == (3, True)
    assert "P2uYro0UCOQ4zxjKXaWCBui1" not in repr(fragment)


def test_credentials_stand_before_the_m_lines_as_well() -> None:
    """So does RFC 8840 have it in its examples; and what it does not know is stepped over."""
    lines = [*PAIR, "a=ice-pacing:50", "a=x-of-ours:1", "m=audio 9 RTP/AVP 0", "a=mid:a", *FOUND]
    fragment = sdpfrag.read(text([*lines, "m=audio 9 RTP/AVP 0", "a=mid:b", *PAIR]))
    assert (fragment.ufrag, fragment.mid, fragment.candidates) == ("EsAw", "a", 3)
    assert not fragment.ended


def test_no_more_than_the_end_is_a_fragment() -> None:
    fragment = sdpfrag.read("a=end-of-candidates\r\n")
    assert fragment.ended
    assert not (fragment.ufrag or fragment.media or fragment.candidates)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([""], "Line 1 of the fragment is neither a=… nor m=…."),
        (["v=0", *FULL], "Line 1 of the fragment is neither a=… nor m=…."),
        ([*LINE, "a=ice-ufrag:\x01\x02abcd"], "Line 3 of the fragment is neither a=… nor m=…."),
        (["m=audio"], "The m-line in line 1 of the fragment is malformed."),
        (["m=audio x RTP/AVP 0"], "The m-line in line 1 of the fragment is malformed."),
        ([LINE[0], *PAIR], "An m-line of the fragment has no a=mid."),
        ([LINE[0], *LINE], "An m-line of the fragment has no a=mid."),
        (["a=mid:0"], "The a=mid in line 1 of the fragment is malformed or not its m-line's own."),
        (
            [*LINE, "a=mid:1"],
            "The a=mid in line 3 of the fragment is malformed or not its m-line's own.",
        ),
        (
            [*LINE, *LINE],
            "The a=mid in line 4 of the fragment is malformed or not its m-line's own.",
        ),
        (
            [*LINE, "a=group:BUNDLE 0"],
            "The a=group in line 3 of the fragment is malformed, a second one, or too late.",
        ),
        (
            ["a=ice-ufrag:abc"],
            "The a=ice-ufrag in line 1 of the fragment is not 4 to 256 characters.",
        ),
        (
            ["a=ice-pwd:short"],
            "The a=ice-pwd in line 1 of the fragment is not 22 to 256 characters.",
        ),
        (
            [*PAIR, "a=ice-ufrag:other"],
            "The a=ice-ufrag in line 3 of the fragment differs from the one before.",
        ),
        (PAIR[:1], "The fragment has one of a=ice-ufrag and a=ice-pwd without the other."),
        (FOUND, "The a=candidate in line 1 of the fragment comes before any m-line."),
        ([*LINE, "a=candidate:"], "The a=candidate in line 3 of the fragment is malformed."),
        (
            [*LINE, "a=candidate:1 1 udp x 192.0.2.1 9 typ host"],
            "The a=candidate in line 3 of the fragment is malformed.",
        ),
        ([*LINE, *FOUND * 22], "The fragment has more than 64 candidates."),
        (
            [f"{line}{at}" for at in range(17) for line in ("m=audio 9 RTP/AVP ", "a=mid:")],
            "The fragment has more than 16 m-lines.",
        ),
        (["a=x:" + "y" * 1000] * 17, "The fragment is longer than 16384 characters."),
        (["a=x:" + "y" * 1025], "Line 1 of the fragment is neither a=… nor m=…."),
    ],
)
def test_a_wrong_fragment_is_told_what_is_wrong(lines: list[str], sentence: str) -> None:
    with pytest.raises(sdpfrag.FragmentError) as raised:
        sdpfrag.read(text(lines))
    assert str(raised.value) == sentence


def test_the_answer_to_a_restart_line_by_line() -> None:
    fragment = sdpfrag.read(text(FULL))
    found = sdpfrag.answer(fragment, "hint", "p" * 24, [("192.0.2.5", 3478), ("2001:db8::5", 3478)])
    assert found == text(
        [
            "a=group:BUNDLE 0 1",
            "m=audio 9 UDP/TLS/RTP/SAVPF 111",
            "a=mid:0",
            "a=ice-ufrag:hint",
            "a=ice-pwd:" + "p" * 24,
            "a=candidate:1 1 udp 2130706431 192.0.2.5 3478 typ host",
            "a=candidate:2 1 udp 2130706175 2001:db8::5 3478 typ host",
            "a=end-of-candidates",
        ]
    )
    assert sdpfrag.read(found).ufrag == "hint"  # what we write we would take


def test_a_restart_without_an_m_line_gets_no_more_than_credentials() -> None:
    found = sdpfrag.answer(sdpfrag.read(text(PAIR)), "hint", "p" * 24, [("192.0.2.5", 3478)])
    assert found == text(["a=ice-ufrag:hint", "a=ice-pwd:" + "p" * 24])


@given(st.lists(st.one_of(st.sampled_from(FULL), st.text(max_size=40)), max_size=30))
def test_any_lines_end_in_a_fragment_or_in_a_sentence(lines: list[str]) -> None:
    try:
        found = sdpfrag.read(text(lines))
    except sdpfrag.FragmentError as error:
        assert str(error)  # noqa: PT017
        return
    answered = sdpfrag.answer(found, "hint", "p" * 24, [("192.0.2.5", 3478)])
    assert sdpfrag.read(answered).ufrag == "hint"


@given(st.text())
def test_any_text_does_too(noise: str) -> None:
    try:
        sdpfrag.read(noise)
    except sdpfrag.FragmentError as error:
        assert str(error)  # noqa: PT017
