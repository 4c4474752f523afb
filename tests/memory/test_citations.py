import random
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentctx.memory.citations import Verifier
from agentctx.memory.types import Document, Locator

COURT = (
    "The court of appeal sat on 3 May 1934. It ruled, after a long debate, that the “lease of 1921” had "
    "ended — and that the tenant’s claim was void.\n\n"
    "The ﬁrst judge dissented; his reasons are well-\nknown and often cited as an exam-\nple of clarity. "
    "Ünïcode naïveté   was\u00a0not\tan issue…  The fine was 1,250 francs, "
    "payable in co\xadoper\u200bation.\n"
    "name\tcity\nBo\tOslo\n"
)
RIVER = "The river rises in the north. In spring it floods the plain, and the farmers wait until June to sow."
court, river = Document.of(COURT, "court.txt"), Document.of(RIVER, "river.txt")
VERIFIER = Verifier([court, river])

TYPOGRAPHY = {
    "“": '"',
    "”": '"',
    "’": "'",
    "—": "–",
    "-": "‐",
    "…": "...",
    "ﬁ": "fi",
    "\xad": "",
    "\u200b": "",
}


# Words and numbers, with what is invisible in them, and with the hyphen and the line end of a broken one.
WHOLE = re.compile(r"\d(?:[,.]?\d)*|(?:[^\W\d_]|[\xad\u200b](?=\w)|-\n(?=\w))+")
INSIDE = [at for match in WHOLE.finditer(COURT) for at in range(match.start() + 1, match.end())]
EDGES = [at for at in range(len(COURT) + 1) if at not in INSIDE]


def disturbed(text: str, rng: random.Random) -> str:
    out = []
    for character in text:
        if character.isspace():
            out.append(rng.choice([" ", "  ", "\n", "\t ", "\u00a0"]))
        elif rng.random() < 0.5:
            out.append(TYPOGRAPHY.get(character, rng.choice([character.upper(), character.lower()])))
        else:
            out.append(character)
    return "".join(out)


@st.composite
def slices(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.sampled_from([at for at in EDGES if at <= len(COURT) - 20]))
    return start, draw(st.sampled_from([at for at in EDGES if at >= start + 16]))


@given(slices(), st.randoms(use_true_random=False))
def test_any_slice_of_whole_words_however_disturbed_is_supported(
    span: tuple[int, int], rng: random.Random
) -> None:
    original = COURT[span[0] : span[1]]
    quote = disturbed(original, rng)
    assume(len("".join(quote.split())) >= 12)
    citation = VERIFIER.verify(quote, court.id, "the claim")
    assert citation.verdict == "supported"
    assert citation.span is not None
    assert citation.quote == COURT[citation.span.start : citation.span.end]
    assert (citation.source, citation.claim) == ("court.txt", "the claim")
    visible = original.strip("\xad\u200b \t\n\u00a0")
    start = COURT.index(visible, span[0])
    assert (citation.span.start, citation.span.end) == (start, start + len(visible))


@st.composite
def cut_slices(draw: st.DrawFn) -> tuple[int, int]:
    inside, length = draw(st.sampled_from(INSIDE)), draw(st.integers(30, 90))
    return (inside, inside + length) if draw(st.booleans()) else (max(0, inside - length), inside)


@given(cut_slices(), st.randoms(use_true_random=False))
def test_a_slice_that_cuts_a_word_or_a_number_is_not_found(span: tuple[int, int], rng: random.Random) -> None:
    original = COURT[span[0] : span[1]]
    assume(not original.startswith(("-", "\n", "\xad", "\u200b")) and not original.endswith(("-", "\n")))
    assert VERIFIER.verify(disturbed(original, rng), court.id).verdict == "not_found"


RENT = (
    "The rent is 11,500 dollars a month, due on 3.5.1934 at 12:30; "
    "the tenant is unable to end the lease early."
)


@pytest.mark.parametrize(
    "quote",
    [
        "1,500 dollars a month",
        "500 dollars a month, due on",
        "able to end the lease early",
        "The rent is 11,5",
        "RENT is 11,500 dollars a month, due on 3",
        "a month, due on 3.5.",
        "34 at 12:30; the tenant is unable",
        "due on 3.5.1934 at 12",
        "the tenant is un",
        "able to end the lease early. The rent is 11,500 dollars a month",  # no seam mends a cut word
    ],
)
def test_a_part_of_a_number_or_of_a_word_says_something_else(quote: str) -> None:
    assert Verifier([Document.of(RENT)]).verify(quote).verdict == "not_found"


def test_a_whole_place_is_preferred_and_code_may_cut() -> None:
    twice = Document.of(f"{RENT} It is 500 dollars a month.")
    citation = Verifier([twice]).verify("500 dollars a month")
    assert citation.verdict == "supported" and citation.span is not None
    assert citation.span.start == twice.text.rindex("500")
    inside = RENT.index("able to end")
    assert Verifier([twice]).verify("able to end the lease early", near=inside).verdict == "supported"


def test_scripts_without_gaps_have_no_edges() -> None:
    text = "法院於五月三日裁定該合約無效而且不得上訴到最高法院"
    assert Verifier([Document.of(text)]).verify(text[3:20]).verdict == "supported"


@given(slices(), st.randoms(use_true_random=False))
def test_the_wrong_source_is_misattributed(span: tuple[int, int], rng: random.Random) -> None:
    quote = disturbed(COURT[span[0] : span[1]], rng)
    assume(len("".join(quote.split())) >= 12)
    for cited in (river.id, "unknown"):
        citation = VERIFIER.verify(quote, cited)
        assert (citation.verdict, citation.source) == ("misattributed", "court.txt")
    assert VERIFIER.verify(quote).verdict == "supported"


@given(st.integers(0, len(COURT) - 1), st.integers(0, 9), st.integers(5, 60), st.integers(5, 60))
def test_one_digit_changed_is_not_found(at: int, digit: int, before: int, after: int) -> None:
    at = next((i for i in range(at, len(COURT)) if COURT[i].isdigit()), COURT.index("3"))
    assume(COURT[at] != str(digit))
    start = max(edge for edge in EDGES if edge <= max(0, at - before))
    end = min(edge for edge in EDGES if edge >= min(len(COURT), at + after))
    quote = COURT[start:at] + str(digit) + COURT[at + 1 : end]
    citation = VERIFIER.verify(quote, court.id)
    assert (citation.verdict, citation.span, citation.quote) == ("not_found", None, quote)


@pytest.mark.parametrize("seam", [" ", " … ", " [...] ", "\n"])
def test_two_sentences_joined_are_stitched(seam: str) -> None:
    quote = "the court of appeal sat on 3 May 1934." + seam + "his reasons are well- known and often cited"
    citation = VERIFIER.verify(quote, court.id)
    assert citation.verdict == "stitched"
    assert citation.quote == (
        "The court of appeal sat on 3 May 1934. … his reasons are well-\nknown and often cited"
    )
    spans = VERIFIER.fragments(quote)
    assert citation.span == spans[0]
    assert [COURT[span.start : span.end] for span in spans] == citation.quote.split(" … ")


@pytest.mark.parametrize(
    "quote",
    [
        "The court of appeal sat on 3 May 1934. the farmers wait until June",  # two sources
        "The court of appeal ruled, after a long debate, that void",  # a fragment of one word
        "The court of sat on 3 the lease of the tenant’s claim his reasons are",  # runs too short
        "The jury acquitted the accused.",
        "court",  # too short, no line, no cell
        "",
        " … ",
    ],
)
def test_not_found(quote: str) -> None:
    assert VERIFIER.verify(quote, court.id).verdict == "not_found"


@pytest.mark.parametrize(
    ("quote", "shown"),
    [
        ("often cited as an example of clarity", "often cited as an exam-\nple of clarity"),
        ("his reasons are well-known and", "his reasons are well-\nknown and"),
        ("payable in cooperation", "payable in co\xadoper\u200bation"),
        ('"The river rises in the north..."', "The river rises in the north"),
        ("oslo", "Oslo"),  # a whole cell
        ("Bo Oslo", "Bo\tOslo"),  # a whole line
    ],
)
def test_supported_with_the_text_of_the_source(quote: str, shown: str) -> None:
    citation = VERIFIER.verify(quote)
    assert (citation.verdict, citation.quote) == ("supported", shown)


def test_a_cell_of_a_comma_separated_file() -> None:
    text = 'name,age\n"Ann",41\n'
    table, prose = Document.of(text, media_type="text/csv"), Document.of("Well, Ann, it is late,41\n")
    assert Verifier([table]).verify("ann").verdict == "supported"
    assert Verifier([prose]).verify("Ann").verdict == "not_found"


def test_page_and_locator_are_attached() -> None:
    page = Locator(31, len(RIVER), "page", 7)
    line = Locator(31, 60, "line", 2)
    citation = Verifier([Document.of(RIVER, "r.pdf", locators=(page, line))]).verify("IT FLOODS THE PLAIN")
    assert (citation.page, citation.locator) == (7, line)
