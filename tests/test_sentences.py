"""Replies cut into sentences."""

import hypothesis
import pytest
from hypothesis import strategies as st

import sentences
from sentences import Sentences


def cut(*pieces: str) -> list[str]:
    reply = Sentences(spoken=True)
    return [each for piece in pieces for each in reply.add(piece)] + reply.end()


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        (("One. Two.",), ["One.", "Two."]),
        (("On", "e. T", "wo"), ["One.", "Two"]),
        (
            (
                "Pi is 3.",
                "14. Yes",
            ),
            ["Pi is 3.14.", "Yes"],
        ),
        (('He said "no." And', " left!"), ['He said "no."', "And left!"]),
        (("你好。再见！",), ["你好。", "再见！"]),
        (("a list:\n- one\n\n- two",), ["a list:", "- one", "- two"]),
        ((" ", "\n"), []),
    ],
)
def test_sentences(pieces: tuple[str, ...], found: list[str]) -> None:
    assert cut(*pieces) == found


def test_text_without_an_end_is_cut() -> None:
    found = cut(*["word "] * 1_000)
    assert len(found) > 1
    assert all(len(each) <= sentences.SENTENCE_CHARACTERS_MAX for each in found)
    assert " ".join(found).split() == ["word"] * 1_000
    assert "".join(cut("x" * 100_000)) == "x" * 100_000


@hypothesis.given(st.lists(st.text(alphabet="ab. !?\n。\"'"), max_size=20))
def test_nothing_is_lost(pieces: list[str]) -> None:
    assert "".join("".join(cut(*pieces)).split()) == "".join("".join(pieces).split())


def test_what_is_remembered_is_bounded() -> None:
    reply = Sentences(spoken=True)
    for number in range(10_000):
        reply.tell(number, "x")
    assert len(reply.told) == sentences.SENTENCES_MAX
