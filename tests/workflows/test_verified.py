"""Quotes are verified in threads: what many runs and many threads find at once is what one finds alone."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.citations import Verifier
from agentctx.memory.types import Document
from agentctx.testing import ScriptedChat, finding, scripted_model

THREADS = 6


def document(seed, sentences=200):
    rng = random.Random(seed)
    lines = [
        f"Sentence {n} \u201cspeaks\u201d of {rng.randrange(10**6)} and exam-\nples."
        for n in range(sentences)
    ]
    return Document.of("  ".join(lines), f"{seed}.txt")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_threads_that_verify_at_once_agree_with_one_alone(seed, data):
    documents = [document(seed), document(seed + 1)]
    quotes = []
    for _ in range(12):
        text = data.draw(st.sampled_from(documents)).text
        start = data.draw(st.integers(0, len(text) - 60))
        quote = text[start : start + 60]
        change = data.draw(
            st.sampled_from((str, str.upper, lambda q: q.replace("-\n", ""), lambda q: q + "x9"))
        )
        quotes.append(change(quote.replace("  ", " ")))
    alone = Verifier(documents)
    expected = [alone.verify(quote, documents[0].id) for quote in quotes]
    shared, together = Verifier(documents), threading.Barrier(THREADS)

    def verify(_):
        together.wait()
        return [shared.verify(quote, documents[0].id) for quote in quotes]

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(verify, range(THREADS))) == [expected] * THREADS


async def test_runs_side_by_side_give_the_answers_of_runs_alone():
    text = document(7, 900).text + " The code of  Zed\nis K77. " + document(8, 300).text
    model = scripted_model(ScriptedChat(reply=_loose, delay=0.001), context=1500)
    ctx = Context.open([Document.of(text, "hay.txt")], model=model, ephemeral=True)
    alone = await ctx.aask("What is the code of Zed?", strategy="map_reduce")
    assert (alone.status, alone.citations[0].quote) == ("complete", "The code of  Zed\nis K77.")
    answers = await asyncio.gather(
        *(ctx.aask("What is the code of Zed?", strategy="map_reduce") for _ in range(8))
    )
    for answer in answers:
        assert (answer.text, answer.citations, answer.coverage) == (
            alone.text,
            alone.citations,
            alone.coverage,
        )


def _loose(messages):
    """Quotes in its own white space and case: only the normal forms hold it."""
    said = finding(r"The\s+code\s+of\s+(\w+\s+is\s+\w+)\.")(messages)
    for name in ("facts", "claims"):
        for claim in said.get(name, ()):
            claim["quotes"] = [" ".join(quote.split()).upper() for quote in claim["quotes"]]
    return said
