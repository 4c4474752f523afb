"""The support check refuses every word and number that the span does not hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.workflows.grounding import claim, content_words, supported_part, supported_share, supports

SPAN = "The Harrow Bridge was designed by Anna Holt and opened on 3 May 1911, at a cost of 4,500 crowns."
ASKED = "who designed the harrow bridge"


@pytest.mark.parametrize(
    "answer",
    [
        "Anna Holt",
        "The Harrow Bridge was designed by Anna Holt.",
        "ANNA HOLT designed it, at a cost of 4500 crowns",
        "The bridge opened on 3 May 1911.",
        "Ａｎｎａ Holt",  # full-width letters
    ],
)
def test_what_the_span_says_is_supported(answer: str) -> None:
    assert supports(answer, SPAN, ASKED)


@pytest.mark.parametrize(
    "answer",
    [
        "Anna Hall",
        "Anna Holt in 1912",
        "Not Anna Holt",
        "Anna Holt never designed it",
        "It cost 4,501 crowns",
        "It cost 45,00 crowns",
        "Yes",
    ],
)
def test_one_foreign_word_or_number_is_refused(answer: str) -> None:
    assert not supports(answer, SPAN, ASKED)


@pytest.mark.parametrize("answer", ["", "  ", "The bridge.", "It is the Harrow Bridge who designed", "..."])
def test_an_answer_that_repeats_the_question_says_nothing(answer: str) -> None:
    assert not claim(answer, ASKED)
    assert not supports(answer, SPAN, ASKED)


def test_a_word_of_the_question_needs_no_support() -> None:
    assert supports("Anna Holt, in Leeds", SPAN, "who designed the bridge in Leeds")


@pytest.mark.parametrize(
    ("answer", "span"), [("5.3", "It rose 3.5 points."), ("1.7", "In version 7.1"), ("12:30", "30:12")]
)
def test_numbers_count_whole(answer: str, span: str) -> None:
    assert content_words(answer) <= content_words(span)
    assert not supports(answer, span, "how much")


def test_scripts_without_spaces() -> None:
    span = "東京都は日本の首都である。"
    assert supports("東京都", span, "日本の首都は？")
    assert not supports("京都府", span, "日本の首都は？")


def test_share_is_the_part_of_the_claim_that_is_there() -> None:
    assert supported_share("Anna Holt Leeds Kirby", SPAN, ASKED) == 0.5
    assert supported_share("", SPAN, ASKED) == 0.0


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ("Anna Holt", "Anna Holt"),
        ("Anna Holt, in front of a crowd of", "Anna Holt"),
        ("Anna Holt, on 3 May 1911, with a band", "Anna Holt, on 3 May 1911"),
        ("Anna Holt (born in Leeds)", "Anna Holt"),
        ("It cost 4,500 crowns, not 5,000", "It cost 4,500 crowns"),
        ("Anna Hall, on 3 May 1911", ""),
        ("The Harrow Bridge, Leeds", ""),
        ("", ""),
    ],
)
def test_the_supported_beginning_ends_at_a_clause(answer: str, part: str) -> None:
    assert supported_part(answer, SPAN, ASKED) == part


@given(
    answer=st.text(alphabet="ab ,;.1"), span=st.text(alphabet="ab ,;.1"), question=st.text(alphabet="a b1")
)
def test_the_part_shown_is_a_supported_beginning(answer: str, span: str, question: str) -> None:
    part = supported_part(answer, span, question)
    assert answer.startswith(part)
    assert not part or supports(part, span, question)
    assert part == answer if supports(answer, span, question) else part != answer or not answer


@given(span=st.text(), start=st.integers(0, 50), length=st.integers(1, 50), question=st.text())
def test_whole_words_of_the_span_never_lack_support(
    span: str, start: int, length: int, question: str
) -> None:
    words = span.split()[start : start + length]
    answer = " ".join(words)
    assert supports(answer, " ".join(span.split()), question) == bool(claim(answer, question))


@given(answer=st.text(), span=st.text(), question=st.text(), more=st.text())
def test_more_text_never_takes_support_away(answer: str, span: str, question: str, more: str) -> None:
    if supports(answer, span, question):
        assert supports(answer, f"{span}\n{more}", question)


@given(answer=st.text(), span=st.text(), question=st.text())
def test_a_word_found_nowhere_is_always_refused(answer: str, span: str, question: str) -> None:
    assert not supports(f"{answer} qzxqzxj", span, question)
