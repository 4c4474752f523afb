import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.sentences import LONGEST, sentences


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    "expected",
    [
        ["The court sat.", "It ruled!", "Did it?", "Yes."],
        ["Mr. J. R. Smith met Dr. Jones at St. Paul's.", "They spoke."],
        ["It costs 3.50 dollars, e.g. for No. 7, see Fig. 2 and p. 12.", "No. 8 is free."],
        ["He moved to the U.S. Army in Jan. 1944.", "He lived in the U.S.", "He died there."],
        ['"Go!" she said.', '"Now?"', "He went."],
        ["Apples, pears etc. are fruit.", "They belong to Smith Inc.", "The firm is old."],
        ["It is known.[12]", "Others disagree."],
        ["He wrote to her... and waited.", "Nothing came…", "Then it did."],
        ["1. Open the box.", "2. Close it."],
    ],
)
def test_latin_prose(expected: list[str]) -> None:
    assert cut(" ".join(expected)) == expected


def test_scripts_without_spaces() -> None:
    assert cut("東京は首都です。人口は多い！本当？「はい。」終") == [
        "東京は首都です。",
        "人口は多い！",
        "本当？",
        "「はい。」",
        "終",
    ]


def test_lines_that_mean_something_end_sentences() -> None:
    lines = [
        "# Costs of the project and of everything else",
        "- the first item of this list, rather long as items go",
        "- the second",
        "name\tamount\tremark that makes the line long enough",
        "rent\t100\tpaid",
        "2024-05-03 10:00:01 INFO the server was started by the operator",
        "2024-05-03 10:00:02 INFO done",
        "result = compute_the_whole_thing(argument, another_argument)",
        "return result",
    ]
    assert cut("\n".join(lines)) == lines


def test_wrapped_lines_are_joined_and_blank_lines_are_not() -> None:
    wrapped = (
        "The committee, which had been sitting since the spring, decided in\n"
        "Paris that the rules of the older treaty should apply, and that no\n"
        "member was exempt. A second vote followed."
    )
    joined, second, rest = cut(wrapped + "\r\n\r\nnothing else happened")
    assert joined.endswith("was exempt.")
    assert second == "A second vote followed."
    assert rest == "nothing else happened"


def test_a_long_sentence_is_cut_at_a_clause() -> None:
    text = "word " * 80 + "end; " + "more " * 60 + "last."
    first, second = cut(text)
    assert first.endswith("end;")
    assert second.startswith("more")
    assert cut("x" * 1500) == ["x" * 600, "x" * 600, "x" * 300]


def test_a_part_of_a_text_keeps_the_offsets_of_the_whole() -> None:
    text = "Zero. One is here. Two is there. Three."
    start, end = text.index("One"), text.index(" Three")
    assert [text[s:e] for s, e in sentences(text, start, end)] == ["One is here.", "Two is there."]


hostile = st.text(
    st.sampled_from(list(" \n\r\t\f.!?…。！；;,:\"'”)([-*#|=0123abcXYZéß日本👍\u200b\u0301\u2028\x85\x1c")),
    max_size=400,
)


@given(hostile | st.text(max_size=200), st.integers(0, 30), st.integers(0, 30))
def test_sentences_and_the_gaps_between_them_cover_the_text(text: str, before: int, after: int) -> None:
    start, end = min(before, len(text)), max(min(before, len(text)), len(text) - after)
    position = start
    for first, last in sentences(text, start, end):
        assert text[position:first].strip() == ""
        assert first < last <= end
        assert last - first <= LONGEST
        assert text[first:last] == text[first:last].strip()
        position = last
    assert text[position:end].strip() == ""
