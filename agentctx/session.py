"""Carry out one run: context, checkpointer, graph, and an answer whatever happens on the way."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentctx.checkpoints import open_saver
from agentctx.memory.documents import Corpus
from agentctx.memory.errors import BudgetExceeded, ModelError
from agentctx.memory.types import Answer, Notice
from agentctx.workflows.conclude import ANSWER, conclude
from agentctx.workflows.frame import Strategy
from agentctx.workflows.run import RunContext


async def execute(
    run: RunContext, strategy: Strategy, corpus: Corpus, folder: Path | None, thread: str
) -> Answer:
    """Run the strategy's graph, from the last checkpoint of `thread` if there is one.

    Raises ModelError if the model could not be reached at all, BudgetExceeded (with the partial answer) if a
    limit ended the run. A stop request gives a partial answer.
    """
    for notice in corpus.warnings:
        run.warnings.append(notice)
    if run.scope.profile.reliable is None:
        run.warn("window_uncalibrated", f"how much {run.scope.profile.name} reads reliably is not known")
    run.trace.emit("run.start", task=run.scope.task.kind, strategy=strategy.name)
    async with open_saver(folder) as saver:
        answer = await _answer(run, strategy, saver, thread)
    covered = replace(answer.coverage, skipped=corpus.skipped, attention=run.left_out)
    answer = replace(answer, coverage=covered)
    run.trace.emit("run.end", status=answer.status)
    return answer


def outcome(run: RunContext, answer: Answer) -> Answer:
    """The answer, or the error that a caller must see instead of it."""
    supported = any(citation.verdict == "supported" for citation in answer.citations)
    if run.dead_error and not run.succeeded and not supported:
        raise run.dead_error
    if not run.succeeded and not run.cached and not supported and (failure := _first_failure(answer)):
        raise ModelError(failure.message, code=failure.code.removeprefix("failed_"))
    if answer.stopped_because and answer.stopped_because != run.stop.reason:
        raise BudgetExceeded(
            f"the run reached its limit ({answer.stopped_because}); the answer is partial",
            partial=answer,
            hint="resume it (agentctx ask --resume ID), with a higher limit (--max-calls N) if yours ended "
            "it, or take a cheaper strategy (see: agentctx plan)",
        )
    return answer


def _first_failure(answer: Answer) -> Notice | None:
    if answer.stopped_because:
        return None
    return next((w for w in answer.warnings if w.code.startswith("failed_")), None)


async def _answer(
    run: RunContext, strategy: Strategy, saver: BaseCheckpointSaver[Any], thread: str
) -> Answer:
    compiled = strategy.graph().compile(checkpointer=saver)
    config: Any = {"configurable": {"thread_id": thread}, "recursion_limit": max(run.plan.supersteps, 8)}
    started = await saver.aget_tuple(config) is not None
    task = run.scope.task
    given: Any = None if started else {"question": task.question, "sources": list(run.scope.documents)}
    main = asyncio.create_task(compiled.ainvoke(given, config, context=run, durability="sync"))
    cancelled = asyncio.create_task(run.stop.requested(twice=True))
    try:
        await asyncio.wait({main, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if main.done():
            return ANSWER.validate_python((await main)["answer"])
        main.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await main
        # What is in memory is enough for an answer without a further call.
        run.stopped_because = run.stopped_because or run.stop.reason
        run.see({"spans": await asyncio.to_thread(strategy.salvage, run, run.seen)})
        covered = strategy.covered(run.scope, run.seen)
        return ANSWER.validate_python(await conclude(run, run.seen, covered, strategy.name))
    finally:
        for pending in (main, cancelled):
            pending.cancel()
        await asyncio.gather(main, cancelled, return_exceptions=True)
