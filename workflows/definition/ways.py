"""The edges of a workflow file as edges of a LangGraph graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langgraph.types import Send

from agentctx.workflows.definition.schema import Edge
from agentctx.workflows.definition.visit import end_of
from agentctx.workflows.definition.wiring import Wiring
from agentctx.workflows.frame import Graph

SENDS = 512  # LangGraph tasks per superstep; more items than that travel in batches


@dataclass(frozen=True)
class Ways:
    """Adds to `graph` the ways on from each node."""

    graph: Graph
    wiring: Wiring

    def add(self, edge: Edge) -> None:
        """Add the ways on from a node; one to a node that has used up its visits leads to the end."""
        ends = [end_of(end) for end in edge.ends()]
        if edge.map:
            self.graph.add_conditional_edges(edge.source, self._fan_out(edge), ends)
            return
        bounded = [end for end in ends if end != "finish" and self._most(end)]
        if not edge.match and not bounded:
            for end in ends:
                self.graph.add_edge(edge.source, end)
            return
        self.graph.add_conditional_edges(
            edge.source, self._route(edge), list(dict.fromkeys([*ends, "finish"]))
        )

    def _most(self, name: str) -> int | None:
        return self.wiring.flow.nodes[name].max_visits

    def _open(self, state: Any, end: str) -> bool:
        """True if a node may be visited once more."""
        most = None if end == "finish" else self._most(end)
        return most is None or state.get("visits", {}).get(end, 0) < most

    def _route(self, edge: Edge) -> Callable[[Any], list[str]]:
        def route(state: Any) -> list[str]:
            if not edge.match:
                ends = [end_of(end) for end in edge.ends()]
                return [end for end in ends if self._open(state, end)] or ["finish"]
            default = end_of(edge.match.default)
            wanted = state.get("routes", {}).get(edge.source, default)
            return [next((end for end in (wanted, default) if self._open(state, end)), "finish")]

        return route

    def _fan_out(self, edge: Edge) -> Callable[[Any], list[Send]]:
        assert edge.map
        node = edge.map.node
        key = self.wiring.sites[node].ports[0].key

        def fan_out(state: Any) -> list[Send]:
            items = list(state.get(key, []))
            size = max(1, -(-len(items) // SENDS))
            batches = [items[at : at + size] for at in range(0, len(items), size)]
            # A batch of nothing, so that the way does not end here.
            return [Send(node, {"items": batch}) for batch in batches or [[]]]

        return fan_out
