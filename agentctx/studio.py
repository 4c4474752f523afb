"""Every strategy as a graph for LangGraph's own development server (`langgraph.json`).

The server draws the graph and runs it: it gives a question and paths, model and limits come from the user's
settings. Whoever reaches the server can name paths, so only those below its working directory are read, or
below what AGENTCTX_ROOTS names. Each name here is a factory, so that importing the module opens nothing.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from agentctx.api import Context
from agentctx.corpus.attach import with_index
from agentctx.memory.errors import BudgetExceeded, WorkspaceError
from agentctx.memory.types import Budget
from agentctx.models.load import Model, open_model
from agentctx.paths import Paths
from agentctx.settings import Settings
from agentctx.workflows.conclude import ANSWER
from agentctx.workflows.frame import Strategy
from agentctx.workflows.registry import strategy
from agentctx.workflows.state import Output

ROOTS = "AGENTCTX_ROOTS"  # directories, separated as in PATH


class Question(TypedDict):
    """What the server's form asks for. `sources` are paths of files and directories."""

    question: str
    sources: list[str]


class Asked(Question, Output):
    """The state of the outer graph."""


StudioGraph = StateGraph[Asked, None, Question, Output]
Factory = Callable[[], StudioGraph]


def _factory(name: str) -> Factory:
    def graph() -> StudioGraph:
        return studio_graph(strategy(name))

    graph.__name__ = name
    return graph


def studio_graph(chosen: Strategy) -> StudioGraph:
    """The strategy's graph inside one node, which opens what the settings name."""
    inner = chosen.graph().compile(name=chosen.name)

    async def answer(state: Asked) -> dict[str, Any]:
        context, budget = await asyncio.to_thread(_opened, state["sources"])
        run_id = f"{inner.name}-{secrets.token_hex(3)}"  # the server draws what a node names
        try:
            found = await context.aask(state["question"], strategy=chosen, budget=budget, run_id=run_id)
        except BudgetExceeded as error:
            if error.partial is None:
                raise
            found = error.partial
        return {"answer": ANSWER.dump_python(found, mode="json")}

    graph: StudioGraph = StateGraph(Asked, input_schema=Question, output_schema=Output)
    graph.add_node("answer_it", answer)
    graph.add_edge(START, "answer_it")
    graph.add_edge("answer_it", END)
    return graph


def _opened(sources: str | Sequence[str]) -> tuple[Context, Budget]:
    """The sources with the settings' model, and the settings' limits."""
    settings = Settings.load({})
    settings.export_key()
    given = _inside([sources] if isinstance(sources, str) else sources)
    model = _model(settings, Paths.default())
    return Context.open(given, model=model, offline=settings.offline, ephemeral=True), settings.budget()


def _inside(sources: Sequence[str]) -> list[str]:
    """The sources. WorkspaceError for one that is outside of what the server may read, links followed."""
    roots = [Path(root).expanduser().resolve() for root in os.environ.get(ROOTS, os.curdir).split(os.pathsep)]
    for source in sources:
        if "\0" in source or not any(Path(source).resolve().is_relative_to(root) for root in roots):
            raise WorkspaceError(
                f"{source!r} is outside of what this server may read",
                hint=f"start it in a directory above, or set {ROOTS}",
            )
    return list(sources)


@functools.lru_cache(maxsize=1)
def _model(settings: Settings, paths: Paths) -> Model:
    """Opened once, for all questions and graphs: a local model is large, and keeps what it has read."""
    model = open_model(
        settings.model,
        base_url=settings.base_url,
        paths=paths,
        offline=settings.offline,
        window=settings.window,
        attention=settings.attention,
        exact=settings.exact,
        linears=settings.linears,
        kv_dtype=settings.kv_dtype,
        kv_bytes=0,
        memory_bytes=settings.memory_bytes,
        concurrency=settings.concurrency,
    )
    return with_index(model, paths)


auto = _factory("auto")
direct = _factory("direct")
spans = _factory("spans")
lexical = _factory("lexical")
map_reduce = _factory("map_reduce")
search = _factory("search")
agents = _factory("agents")
fold = _factory("fold")
continue_ = _factory("continue")
experience = _factory("experience")
gist = _factory("gist")
recursive = _factory("recursive")
kv_retrieval = _factory("kv_retrieval")
rank = _factory("rank")
reread = _factory("reread")
