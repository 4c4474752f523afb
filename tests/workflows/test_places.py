"""A citation names the place that was shown or chosen, where other places hold the same words."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.citations import Verifier
from agentctx.memory.types import Document, Span
from agentctx.testing import ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.strategies.fold import Fold
from agentctx.workflows.strategies.spans import Spans

CLAUSE = "The monthly fee is 500 euros and payable in advance."
LINE = "Total due is 120 euros exactly."
LABELS = ("paid", "unpaid")


def rain(sentences, seed):
    rng = random.Random(seed)
    return " ".join(f"Sentence {n} speaks of {rng.choice('abcdefgh') * 5} only." for n in range(sentences))


def lease():
    """The same clause in two versions; a word in the second one only."""
    old = Document.of(f"{rain(90, 1)} {CLAUSE} {rain(90, 2)}", "lease-2021.md")
    return old, Document.of(f"Zanzibar applies. {CLAUSE} {rain(180, 3)}", "lease-2024.md")


def opened(reply, *documents):
    model = scripted_model(ScriptedChat(reply=reply), context=1500)
    return Context.open(documents, model=model, ephemeral=True)


def reader(wanted, quote):
    """Finds `quote` in a text that also holds the word, and in what was noted of it."""

    def reply(messages):
        system, texts = str(messages[0].text), list(fenced_texts(str(messages[-1].text)))
        final = '"claims"' in system or system.startswith("You are given notes")
        found = any(quote in text and (final or wanted in text) for text in texts)
        claims = [{"text": "500 euros", "quotes": [quote]}] if found else []
        if '"label"' in system:
            return {
                "label": LABELS[0],
                "quotes": [quote] * found,
                "confidence": 3,
                "no_information": not found,
            }
        if '"add"' in system:
            return {"add": claims}
        for name in ("facts", "points"):
            if f'"{name}"' in system:
                return {name: claims, "no_information": not claims}
        return {"text": "500", "claims": claims, "no_information": not claims}

    return reply


def inside(span, other):
    return span.document_id == other.document_id and other.start <= span.start and span.end <= other.end


@pytest.mark.parametrize("strategy", [Spans(method="lexical", keep=100), "map_reduce", "fold", "agents"])
def test_of_two_documents_the_one_that_was_shown_is_cited(strategy):
    old, new = lease()
    answer = opened(reader("Zanzibar", CLAUSE), old, new).ask("What of Zanzibar?", strategy=strategy)
    assert [(c.source, c.quote, c.verdict) for c in answer.citations] == [
        ("lease-2024.md", CLAUSE, "supported")
    ]
    assert not any(inside(c.span, gap) for c in answer.citations for gap in answer.coverage.unread)


def test_a_claim_of_what_was_not_shown_is_still_found_where_it_stands():
    old, new = lease()
    other = "Sentence 17 speaks of"
    quote = next(s for s in re.findall(r"Sentence 17 speaks of \w+ only\.", old.text))
    assert other in new.text
    assert quote not in new.text
    ctx = opened(lambda messages: {"text": "x", "claims": [{"text": "x", "quotes": [quote]}]}, old, new)
    answer = ctx.ask("What of Zanzibar?", strategy=Spans(method="lexical", keep=100))
    assert [(c.source, c.verdict) for c in answer.citations] == [("lease-2021.md", "supported")]


def items(messages):
    """What everybody in the text paid; any two belong together."""
    found = []
    for text in fenced_texts(str(messages[-1].text)):
        names = re.findall(r"(?<=Paid by )\w+", text)
        found += [{"key": name, "value": "120", "quotes": [LINE]} for name in names]
    if '"holds"' in str(messages[0].text):
        return {"holds": True}
    return {"items": found, "no_information": not found}


@pytest.mark.parametrize("kind", ["aggregate", "pairwise"])
def test_of_a_line_that_is_repeated_each_read_cites_its_own(kind):
    payers = ["Ann", "Bob", "Cid"]
    text = " ".join(f"{rain(160, n)} Paid by {name}. {LINE}" for n, name in enumerate(payers))
    ctx = opened(items, Document.of(text, "ledger.txt"))
    answer = ctx.ask("What is paid?", kind=kind)
    wanted = [text.index(LINE, text.index(f"Paid by {name}")) for name in payers]
    assert sorted(c.span.start for c in answer.citations) == wanted
    assert {c.claim.partition(":")[0] for c in answer.citations} <= {*payers, "Ann and Bob", "Ann and Cid"}


def test_a_vote_cites_where_it_was_cast():
    text = f"{LINE} {rain(300, 1)} Paid in May. {LINE}"
    ctx = opened(reader("May", LINE), Document.of(text, "ledger.txt"))
    answer = ctx.ask("Paid?", kind="classify", labels=LABELS)
    assert [(c.span.start, c.claim) for c in answer.citations] == [(text.rindex(LINE), "paid")]


@pytest.mark.parametrize("strategy", ["map_reduce", Fold()])
def test_a_point_of_a_summary_cites_what_was_read_for_it(strategy):
    text = f"{LINE} {rain(300, 1)} Paid in May. {LINE}"
    answer = opened(reader("May", LINE), Document.of(text, "ledger.txt")).summarize(strategy=strategy)
    assert [(c.quote, c.span.start) for c in answer.citations] == [(LINE, text.rindex(LINE))]


def test_the_points_of_a_file_cite_that_file():
    old, new = lease()
    ctx = opened(reader("", CLAUSE), old, new)
    answer = ctx.summarize(per="file", strategy="map_reduce")
    assert [c.source for c in answer.citations] == ["lease-2021.md", "lease-2024.md"]
    said = "lease-2021.md - 500 euros [1] lease-2024.md - 500 euros [2]"
    assert answer.text.split() == said.split()


@settings(deadline=None, derandomize=True)
@given(data=st.data(), copies=st.integers(1, 6), capitals=st.booleans())
def test_a_place_inside_what_was_shown_goes_before_all_others(data, copies, capitals):
    """Also before one that is closer to its begin, one of a stricter comparison, and one of a first text."""
    between = data.draw(st.lists(st.text("ab \n", max_size=40), min_size=copies, max_size=copies))
    here = "".join(f"{gap} {CLAUSE.upper() if capitals else CLAUSE} " for gap in between)
    documents = [Document.of(f"{CLAUSE} {here}", "first"), Document.of(here, "second")]
    text = documents[1].text
    start = data.draw(st.integers(0, len(text)))
    shown = Span(documents[1].id, start, data.draw(st.integers(start, len(text))))
    found = Verifier(documents).verify(CLAUSE, shown=[shown])
    places = [m.start() for m in re.finditer(re.escape(CLAUSE), text, re.IGNORECASE)]
    there = [p for p in places if shown.start <= p and p + len(CLAUSE) <= shown.end]
    assert found.verdict == "supported"
    assert found.span.document_id == documents[1].id
    assert found.span.start == (there or places)[0]


def test_what_is_nowhere_is_of_no_source():
    old, new = lease()
    citation = Verifier([old, new]).verify("The fee is waived for ever.", shown=[Span(new.id, 0, 90)])
    assert (citation.verdict, citation.source, citation.span) == ("not_found", "", None)
