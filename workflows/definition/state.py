"""The state of a workflow's graph: that of every strategy, and a key for what each node gives."""

from __future__ import annotations

import operator
from typing import Annotated, Any

from agentctx.workflows.state import State, merged


def joined(old: list[int], new: list[int]) -> list[int]:
    """The numbers that two visits gave."""
    return sorted({*old, *new})


def added(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The numbers that nodes gave, joined node by node."""
    return {**old, **{name: joined(old.get(name, []), numbers) for name, numbers in new.items()}}


class DefinitionState(State, total=False):
    """What the workflow itself needs to know."""

    items: list[int]  # the batch that one Send carries
    routes: Annotated[dict[str, str], merged]  # node -> where its match leads
    visits: Annotated[dict[str, int], merged]  # node -> how often it ran
    taken: Annotated[dict[str, list[int]], added]  # node -> reads that it does not give again
    shown: Annotated[dict[str, list[int]], added]  # node -> reads whose text it sent as it is
    weighed: Annotated[dict[str, list[int]], added]  # node -> reads that the Reader scored
    inner: Annotated[dict[str, Any], merged]  # node -> the last state of the strategy inside
    told: Annotated[list[str], operator.add]  # the nodes that gave an answer, in order
    lost: Annotated[dict[str, int], merged]  # node -> notes that it could not pass on
