"""Every strategy as a graph for LangGraph's own development server (`langgraph.json`).

The server draws the graph and runs it: it gives a question and paths, model and limits come from the user's
settings. Each name here is a factory, so that importing the module opens nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from agentctx.api import Context
from agentctx.memory.types import Plan
from agentctx.models.load import Model
from agentctx.privacy import kept_here
from agentctx.settings import Settings
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.fence import draw_tag
from agentctx.workflows.frame import Strategy
from agentctx.workflows.registry import strategy
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Output, Task
from agentctx.workflows.trace import Trace


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
    inner = chosen.graph().compile()  # named in the node below, so the server draws it too

    async def answer(state: Asked) -> dict[str, Any]:
        model, scope, plan = await asyncio.to_thread(_opened, chosen, state["question"], state["sources"])
        run_id = f"studio-{secrets.token_hex(3)}"
        run = RunContext(run_id, scope, model.chat, plan, LeafCache(None), Trace(run_id))
        given: Any = {"question": state["question"], "sources": list(scope.documents)}
        try:
            with kept_here(Settings.load({}).offline):
                done = await inner.ainvoke(given, {"recursion_limit": max(plan.supersteps, 8)}, context=run)
        finally:
            run.cache.close()
        return {"answer": done["answer"]}

    graph: StudioGraph = StateGraph(Asked, input_schema=Question, output_schema=Output)
    graph.add_node("answer_it", answer)
    graph.add_edge(START, "answer_it")
    graph.add_edge("answer_it", END)
    return graph


def _opened(chosen: Strategy, question: str, sources: list[str]) -> tuple[Model, Scope, Plan]:
    """The settings' model, the sources, and what the run may cost within the settings' limits."""
    settings = Settings.load({})
    settings.export_key()
    context = Context.open(
        sources,
        model=settings.model,
        base_url=settings.base_url,
        window=settings.window,
        **settings.local(),
        memory_bytes=settings.memory_bytes,
        concurrency=settings.concurrency,
        offline=settings.offline,
        ephemeral=True,
    )
    documents = {document.id: document for document in context.corpus.documents}
    model = context.model
    scope = Scope(
        Task(question),
        documents,
        model.profile,
        model.counter,
        draw_tag(documents.values(), secrets.token_bytes(16)),
        model.reader,
        chosen.allowed(settings.budget()),
        model.index,
    )
    return model, scope, chosen.plan(scope)


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
