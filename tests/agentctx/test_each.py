"""One question to each source by itself, with scripted models: rows, shares, faults, a second time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.api import Context, Stop
from agentctx.each import Row
from agentctx.memory.citations import Verifier
from agentctx.memory.errors import BudgetExceeded, ConfigError, ModelError
from agentctx.memory.types import Budget, Cost, Document, Notice
from agentctx.paths import Paths
from agentctx.testing import FaultyChat, ScriptedChat, finding, scripted_model

NEEDLE = r"The code of (\w+ is \w+)\."
QUESTION = "What is the code?"


def file(n: int, words: int = 30) -> Document:
    return Document.of(
        f"{'Nothing here. ' * words}The code of Z{n} is K{n}. {'Or here. ' * words}", f"{n}.txt"
    )


def opened(
    documents: Sequence[Document], chat: ScriptedChat, paths: Paths | None = None, **options: Any
) -> Context:
    model = scripted_model(chat, **{"context": 1500, **options})
    return Context.open(documents, model=model, paths=paths, ephemeral=paths is None)


def scripted(**rest: Any) -> ScriptedChat:
    return ScriptedChat(reply=finding(NEEDLE), **rest)


def spent(rows: Sequence[Row]) -> Cost:
    used = [row.answer.usage for row in rows if row.answer]
    return sum((Cost(one.calls, one.input_tokens, one.output_tokens) for one in used), Cost())


def test_each_source_is_answered_from_itself_alone() -> None:
    chat = scripted(delay=0.01)
    each = opened([file(n) for n in range(9)], chat, concurrency=3).each(QUESTION)
    plan = each.plan()
    assert not chat.prompts and "9 files" in plan.assumptions[0]
    rows = list(each.rows())
    assert [row.source for row in rows] == [f"{n}.txt" for n in range(9)]
    for n, row in enumerate(rows):
        assert row.answer is not None and row.answer.text == f"Z{n} is K{n} [1]"
        assert [citation.source for citation in row.answer.citations] == [row.source]
        assert row.answer.coverage.read == row.answer.coverage.total
    assert 1 < chat.peak <= 3
    assert spent(rows).within(plan.ceiling)
    assert all(prompt.count("The code of") == 1 for prompt in chat.prompts)


def test_chunks_are_cited_where_they_stand_in_the_whole() -> None:
    document = Document.of("".join(file(n).text for n in range(6)), "long.txt")
    each = opened([document, file(7)], scripted()).each(QUESTION, per="chunk", chunk_tokens=80)
    rows = list(each.rows())
    assert len(rows) > 8 and rows[-1].source == "7.txt"
    assert "".join(document.text[r.span.start : r.span.end] for r in rows if r.source == "long.txt") == (
        document.text
    )
    found = []
    for row in rows:
        assert row.answer is not None
        for citation in row.answer.citations:
            assert citation.span is not None and citation.verdict == "supported"
            text = document.text if row.source == "long.txt" else file(7).text
            assert text[citation.span.start : citation.span.end] == citation.quote
            assert row.span.start <= citation.span.start < citation.span.end <= row.span.end
            found += re.findall(r"is K(\d)", citation.quote)
    assert found == list("0123457")
    assert {row.answer.status for row in rows if row.answer} == {"complete", "unanswerable"}


def test_a_document_is_prepared_for_citing_once_whatever_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counted(Verifier):
        def __init__(self, documents: Sequence[Document]) -> None:
            made.extend(document.source for document in documents)
            super().__init__(documents)

    monkeypatch.setattr("agentctx.each.Verifier", Counted)
    document = Document.of("".join(file(n).text for n in range(6)), "long.txt")
    chat = scripted()
    each = opened([document, file(7)], chat, concurrency=1).each(QUESTION, per="chunk", chunk_tokens=80)
    rows = list(each.rows())
    assert len([row for row in rows if row.answer and row.answer.citations]) == 7
    assert made == ["long.txt", "7.txt"]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    calls=st.none() | st.integers(0, 12),
    tokens=st.none() | st.integers(0, 4000),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    concurrency=st.integers(1, 4),
)
def test_a_limit_is_for_all_together(
    calls: int | None, tokens: int | None, sizes: list[int], concurrency: int
) -> None:
    chat = scripted()
    budget = Budget(calls=calls, input_tokens=tokens)
    context = opened([file(n, size) for n, size in enumerate(sizes)], chat, concurrency=concurrency)
    each = context.each(QUESTION, budget=budget)
    rows = list(each.rows())
    used = spent(rows)
    assert used.within(each.plan().ceiling)
    assert len(rows) == len(sizes)
    assert len(chat.prompts) == used.calls <= (calls if calls is not None else used.calls)
    assert used.input_tokens <= (tokens if tokens is not None else used.input_tokens)


def test_a_limit_is_shared_fairly_and_what_is_left_goes_on() -> None:
    """Three calls for five: one each, as far as they go. Of eight, those that need less leave more."""
    rows = list(
        opened([file(n) for n in range(5)], scripted(), concurrency=1)
        .each(QUESTION, budget=Budget(calls=3))
        .rows()
    )
    assert [row.error is None for row in rows] == [True, True, True, False, False]
    assert isinstance(rows[-1].error, BudgetExceeded)
    context = opened([file(0), file(1), file(2, 300)], scripted(), concurrency=1)
    alone = opened([file(2, 300)], scripted(), concurrency=1).ask(QUESTION, strategy="map_reduce")
    total = Budget(calls=3 + 2 * alone.plan.ceiling.calls)
    rows = list(context.each(QUESTION, strategy="map_reduce", budget=total).rows())
    assert rows[2].answer is not None and rows[2].answer.status == "complete"


def test_a_plan_is_a_ceiling_for_what_others_leave_too() -> None:
    """With an equal share the long file is read in part; what the short ones leave pays for all of it."""
    long = " ".join(f"Sentence {n} says nothing." for n in range(4000))
    files = [file(0), file(1), Document.of(f"{long} The code of Z2 is K2.", "2.txt")]
    alone = opened(files[2:], scripted(), concurrency=1).plan(QUESTION)
    assert alone.ceiling.calls > 3
    budget = Budget(calls=alone.ceiling.calls + 4)
    each = opened(files, scripted(), concurrency=1).each(QUESTION, budget=budget)
    plan, rows = each.plan(), list(each.rows())
    assert rows[2].answer is not None and rows[2].answer.strategy == alone.strategy
    assert alone.strategy not in plan.strategy, "the share alone would not do"
    assert spent(rows).within(plan.ceiling)
    assert plan.ceiling.calls <= alone.ceiling.calls + 4
    assert all(stage.cost.within(plan.ceiling) for stage in plan.stages)


def test_what_was_left_out_has_a_row_and_what_was_noticed_is_with_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "b.txt").write_text(file(1).text)
    (tmp_path / "c.txt").write_text(file(1).text)
    (tmp_path / "d.txt").write_bytes((file(2).text + " caf\xe9 r\xe9sum\xe9").encode("cp1252"))
    (tmp_path / "id_rsa").write_text("secret")
    model = scripted_model(scripted(), context=1500)
    context = Context.open(
        tmp_path, model=replace(model, warnings=(Notice("slow", "it is"),)), ephemeral=True
    )
    rows = [(Path(row.source).name, row) for row in context.each(QUESTION).rows()]
    assert [name for name, _ in rows] == ["a.bin", "c.txt", "id_rsa", "b.txt", "d.txt"]
    assert [row.error and row.error.code for _, row in rows] == ["binary", "duplicate", "secret", None, None]
    assert [row.span is None for _, row in rows] == [True, True, True, False, False]
    told = [{notice.code for notice in row.answer.warnings} for _, row in rows if row.answer]
    assert [one & {"encoding_guessed", "slow"} for one in told] == [{"slow"}, {"encoding_guessed", "slow"}]


def test_what_fails_fails_alone() -> None:
    chat = FaultyChat(reply=finding(NEEDLE), faults=[None, "refused"])
    rows = list(opened([file(n) for n in range(4)], chat, concurrency=1).each(QUESTION).rows())
    assert [row.error is None for row in rows] == [True, False, True, True]
    assert isinstance(rows[1].error, ModelError)


def test_a_model_that_cannot_be_reached_is_not_asked_again_and_again() -> None:
    chat = FaultyChat(reply=finding(NEEDLE), faults=["auth"] * 99)
    rows = list(opened([file(n) for n in range(30)], chat, concurrency=1).each(QUESTION).rows())
    assert len(chat.prompts) == 1 and len(rows) == 30
    assert all(isinstance(row.error, ModelError) and row.error.code == "auth" for row in rows)


def test_a_second_time_pays_for_what_changed(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    calls = []
    for documents in (
        [file(n) for n in range(5)],
        [file(n) for n in range(5)],
        [*map(file, range(5)), file(9)],
    ):
        chat = scripted()
        rows = list(opened(documents, chat, paths).each(QUESTION).rows())
        assert all(row.answer and row.answer.status == "complete" for row in rows)
        calls.append(len(chat.prompts))
    assert calls == [5, 0, 1]
    assert not paths.runs.exists() or not list(paths.runs.iterdir()), "no folder for each"


def test_it_can_be_stopped_and_taken_up_again(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    stop, chat = Stop(), scripted()
    each = opened([file(n) for n in range(6)], chat, paths, concurrency=1).each(QUESTION)
    rows = []
    for row in each.rows(stop=stop):
        rows.append(row)
        if len(rows) == 2:
            stop.request("interrupted")
    assert len(rows) == 6 and rows[-1].error is not None and rows[-1].error.code == "interrupted"
    done = len(chat.prompts)
    assert 2 <= done <= 3
    again = list(each.rows())
    assert all(row.answer and row.answer.status == "complete" for row in again)
    assert len(chat.prompts) == 6


async def test_leaving_the_loop_ends_what_is_asked() -> None:
    chat = scripted(delay=0.01)
    each = opened([file(n) for n in range(40)], chat, concurrency=2).each(QUESTION)
    rows = each.arows()
    assert (await anext(rows)).answer is not None
    await rows.aclose()
    assert len(chat.prompts) < 10


def test_what_does_not_go_together_is_refused() -> None:
    context = opened([file(1)], scripted())
    for options, said in (
        ({"per": "page"}, "no division per 'page'"),
        ({"chunk_tokens": 90}, "chunk_tokens are for"),
        ({"per": "chunk", "chunk_tokens": 9}, "too small"),
    ):
        given: Any = options
        with pytest.raises(ConfigError, match=said):
            list(context.each(QUESTION, **given).rows())
    with pytest.raises(ConfigError, match="empty"):
        context.each("  ")
    plan = opened([file(0), file(1, 900)], scripted()).each(QUESTION, strategy="direct").plan()
    assert any("1.txt is not answered" in said for said in plan.assumptions)
