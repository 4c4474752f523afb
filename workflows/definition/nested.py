"""Node types that run a strategy inside: `workflow`, one of the registry; `definition`, another file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langgraph.graph import START, StateGraph
from pydantic import Field

from agentctx.memory.types import Stage
from agentctx.workflows.definition.neural import draft
from agentctx.workflows.definition.schema import Form
from agentctx.workflows.definition.site import NodeType, Result, Site, Step
from agentctx.workflows.definition.strategy import Definition
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import no_information
from agentctx.workflows.registry import strategy
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State

LEFT_OUT = ("answer", "question", "sources", "draft", "spans")  # of its state: coverage needs the rest


class WorkflowParams(Form):
    """A strategy by name, with its own parameters. `depth`: how many levels may run inside one another."""

    name: str = Field(min_length=1, max_length=64)
    depth: int = Field(2, ge=1, le=8)
    params: dict[str, bool | int | float | str | None] = Field(default_factory=dict)


class DefinitionParams(Form):
    """Another workflow file under the same folder."""

    file: str = Field(min_length=1, max_length=200)
    depth: int = Field(4, ge=1, le=8)


def _named(site: Site) -> Strategy:
    return strategy(site.params.name, **site.params.params)


def _file(site: Site) -> Strategy:
    folder = site.folder
    return Definition(folder.path(site.params.file), folder.files, (*folder.chain, folder.name))


def _check(site: Site) -> str:
    assert site.inner
    if "search" not in site.inner.kinds:
        return f"{site.inner.name} does not answer questions"
    depth = 1 + site.inner.depth
    return (
        f"it runs {depth} levels deep, and depth is {site.params.depth}" if depth > site.params.depth else ""
    )


def _ceiling(site: Site, scope: Scope) -> list[Stage]:
    assert site.inner
    plan = site.inner.body_plan(scope)
    return [replace(stage, name=f"{site.name}: {stage.name}") for stage in plan.stages]


def _build(site: Site) -> Step:
    assert site.inner
    outer = site.inner

    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        inner = outer.chosen(run.scope)
        plan = inner.body_plan(run.scope)
        compiled = _without_frame(inner).compile()
        given: Any = {"question": run.scope.task.question, "sources": list(run.scope.documents)}
        config: Any = {"recursion_limit": max(plan.supersteps, 8)}
        state = await compiled.ainvoke(given, config, context=run)
        return Result(
            draft(state.get("draft") or no_information(run), state.get("spans", ())),
            state.get("failures", {}),
            state.get("not_forwarded", 0),
            inner={key: value for key, value in state.items() if key not in LEFT_OUT},
        )

    return step


def _without_frame(inner: Strategy) -> Graph:
    """The body alone: the outer frame plans, and checks what comes out."""
    graph: Any = StateGraph(inner.state, RunContext)
    add_node(graph, "verify", _nothing)
    graph.add_edge(START, inner.body(graph))
    made: Graph = graph
    return made


async def _nothing(run: RunContext, state: State) -> dict[str, Any]:
    return {}


WORKFLOW_TYPE = NodeType(
    WorkflowParams, _build, _ceiling, check=_check, replies=lambda site: True, within=_named
)
DEFINITION_TYPE = NodeType(
    DefinitionParams,
    _build,
    _ceiling,
    check=_check,
    files=("file",),
    replies=lambda site: isinstance(site.inner, Definition) and site.inner.replies,
    within=_file,
)
