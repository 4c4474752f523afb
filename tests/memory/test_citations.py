import random

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
    start = draw(st.integers(0, len(COURT) - 20))
    return start, draw(st.integers(start + 16, len(COURT)))


@given(slices(), st.randoms(use_true_random=False))
def test_any_slice_however_disturbed_is_supported(span: tuple[int, int], rng: random.Random) -> None:
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
    quote = COURT[max(0, at - before) : at] + str(digit) + COURT[at + 1 : at + after]
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
