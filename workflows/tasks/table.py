"""The kinds of task by name. A new one is a file, a line here and a name in `state.TaskKind`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from agentctx.workflows.state import TaskKind
from agentctx.workflows.tasks.pipeline import Pipeline

KINDS: Mapping[TaskKind, str] = MappingProxyType(
    {
        "search": "search:Search",
        "summarise": "summarise:Summarise",
        "classify": "classify:Classify",
        "aggregate": "aggregate:Aggregate",
        "pairwise": "pairwise:Pairwise",
        "multi_hop": "multi_hop:MultiHop",
    }
)


def pipeline(kind: TaskKind, fan_in: int | None, max_pairs: int) -> Pipeline:
    """The pipeline of a kind with these limits."""
    module, _, title = KINDS[kind].partition(":")
    made: type[Pipeline] = getattr(import_module(f"agentctx.workflows.tasks.{module}"), title)
    return made(fan_in, max_pairs)
