import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.normalise import Normalised, has_line_end_hyphen, normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b\n\tc", "a b c"),
        ("“It’s” — here", '"it\'s" - here'),
        ("a -- b", "a – b"),
        ("ﬁne Ｗｉｄｅ №", "fine wide no"),
        ("co\xadop\u200berate \u200b x", "cooperate x"),
        ("cafe\u0301 각", "café 각"),
        ("wait…", "wait..."),
        ("Straße", "STRASSE"),
        ("Москва", "МОСКВА"),
    ],
)
def test_equal_but_for_form(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1934", "1935"), ("the rapist", "therapist"), ("re-cover", "recover"), ("a, b", "a b")],
)
def test_different_words_stay_different(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_line_end_hyphens() -> None:
    text = "an exam-\n  ple, a well-\r\nknown one, co\xad\noperation, 3 - \n4"
    assert has_line_end_hyphen(text)
    assert not has_line_end_hyphen("- item\n- well-known\n3 -\n4")
    assert Normalised(text, "dropped").text == "an example, a wellknown one, cooperation, 3 - 4"
    assert Normalised(text, "kept").text == "an exam-ple, a well-known one, co-operation, 3 - 4"


ODD = "aB1 -\n\r\t.“”’—…ﬁß\xa0\xad\u200b\u0301éİ日ｶﾞ각\u1161🏽\u2028\ufe0f"


@given(st.text(st.sampled_from(ODD), max_size=60) | st.text(max_size=60))
def test_the_way_back_is_exact(text: str) -> None:
    form = Normalised(text)
    assert form.text == normalised(text)
    position = 0
    for index in range(len(form.text)):
        start, end = form.source_span(index, index + 1)
        assert 0 <= start < end <= len(text)
        assert start >= position or (start, end) == form.source_span(index - 1, index)
        assert normalised(text[:start]).rstrip(" -") == form.text[: len(normalised(text[:start]))].rstrip(
            " -"
        )
        position = start


@given(st.text(st.sampled_from(ODD), max_size=60))
def test_a_plain_addition_does_not_change_the_form_of_the_rest(text: str) -> None:
    """The quick way for texts without compositions and the slow one agree."""
    simple = "".join(c for c in text if unicodedata.is_normalized("NFKC", c) and len(c.casefold()) == 1)
    simple = "".join(c for c in simple if unicodedata.category(c)[0] != "M" and c not in "\u1161ﾞ")
    assert normalised(simple + " ﬁ") == (normalised(simple + " x")[:-1] + "fi")
