"""One attempt at a run, and its record on disk: what was asked, how it stands, what it spent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agentctx.memory.errors import AgentctxError, BudgetExceeded
from agentctx.memory.types import Answer
from agentctx.runs import Runs, thread_of
from agentctx.session import execute, outcome
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.conclude import ANSWER
from agentctx.workflows.frame import Strategy
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

    Raises what `session.outcome` raises.
    """
    plan = await asyncio.to_thread(strategy.plan, scope)
    runs = Runs(context.paths.runs) if context.listed and not context.ephemeral else None
    folder = runs.folder(run_id) if runs else None
    trace_path = folder / "trace.jsonl" if folder else None
    past = list(read_trace(trace_path)) if trace_path and trace_path.exists() else []
    status: dict[str, Any] = {"status": "failed"}
    cache = LeafCache(None if context.ephemeral else context.paths.calls)
    if runs:
        runs.write(run_id, {**manifest, "status": "running"})
    trace = Trace(run_id, trace_path, on_event)
    run = RunContext(run_id, scope, context.model.chat, plan, cache, trace, stop or Stop())
    if cache.warning:
        run.warn("cache_damaged", cache.warning)
    run.ledger.replay(past)
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
        trace.close()
        cache.close()
        if runs:
            runs.write(run_id, {**manifest, **status})
