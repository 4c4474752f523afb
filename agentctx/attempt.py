"""One attempt at a run, and its record on disk: what was asked, how it stands, what it spent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentctx.memory.errors import AgentctxError, BudgetExceeded
from agentctx.memory.types import Answer
from agentctx.runs import Runs, thread_of
from agentctx.session import execute, outcome
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.conclude import ANSWER
from agentctx.workflows.frame import Strategy
from agentctx.workflows.ledger import limit_of
from agentctx.workflows.run import RunContext, Stop
from agentctx.workflows.scope import Scope
from agentctx.workflows.trace import Event, Trace, read_trace

if TYPE_CHECKING:
    from agentctx.api import Context

Listener = Callable[[Event], None]


async def carried_out(
    context: Context,
    run_id: str,
    manifest: dict[str, Any],
    scope: Scope,
    strategy: Strategy,
    stop: Stop | None,
    on_event: Listener | None,
) -> Answer:
    """Plan and run, with `manifest` on disk true at each step.

    Raises what `session.outcome` raises, and StoreError: locked if somebody else carries it out, or what the
    stores raise.
    """
    plan = await asyncio.to_thread(strategy.plan, scope)
    runs = Runs(context.paths.runs) if context.listed and not context.ephemeral else None
    folder = runs.folder(run_id) if runs else None
    trace_path = folder / "trace.jsonl" if folder else None
    status: dict[str, Any] = {"status": "failed"}
    with (
        runs.locked(run_id) if runs else nullcontext(),
        closing(LeafCache(None if context.ephemeral else context.paths.calls)) as cache,
        closing(Trace(run_id, trace_path, on_event)) as trace,
    ):
        if runs:
            runs.write(run_id, {**manifest, "status": "running"})
        run = RunContext(run_id, scope, context.model.chat, plan, cache, trace, stop or Stop())
        if cache.warning:
            run.warn("cache_damaged", cache.warning)
        if past := list(read_trace(trace_path)) if trace_path else []:
            _taken_up(run, past)
        thread = thread_of(run_id, manifest, manifest["attempt"])
        try:
            answer = await execute(run, strategy, context.corpus, folder, thread)
            status = {"status": answer.status, "answer": ANSWER.dump_python(answer, mode="json")}
            return outcome(run, answer)
        except AgentctxError as error:
            if not isinstance(error, BudgetExceeded):
                status = {"status": "failed", "error": error.message}
            raise
        finally:
            if runs:
                runs.write(run_id, {**manifest, **status})


def _taken_up(run: RunContext, past: Sequence[dict[str, Any]]) -> None:
    """Charge what earlier attempts spent, and plan anew on top of it.

    What they finished comes from the cache. What failed, or was under way when the process died, was charged
    all the same and has bought nothing, so within the first ceiling it could not be made again. The user's
    own limits stay what they are.
    """
    run.ledger.replay(past)
    run.plan = replace(run.plan, ceiling=run.plan.ceiling + run.ledger.spent)
    run.ledger.limit = limit_of(run.scope.budget, run.plan.ceiling)
