"""The shape of a workflow: do all ways end, do all cycles stop, how often does a node run?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from agentctx.workflows.definition.file import Source
from agentctx.workflows.definition.schema import END, START, Edge, Workflow


@dataclass(frozen=True)
class Flow:
    """The edges of a workflow as a graph."""

    flow: Workflow
    edges: Mapping[str, Edge]
    source: Source

    @cached_property
    def after(self) -> dict[str, list[str]]:
        return {name: edge.ends() for name, edge in self.edges.items()} | {END: []}

    def check(self) -> None:
        """Raises ConfigError for a shape that cannot run."""
        self._one_way_each()
        reached = self._from([START])
        for name in self.flow.nodes:
            if name not in reached:
                raise self.source.error(("nodes", name), "nothing leads to it", "add an edge, or remove it")
            if END not in self._from([name]):
                raise self.source.error(("nodes", name), "it never leads to END", "add an edge to END")
        self._cycles_stop()
        self._cycles_are_left_once()
        self._joins_wait()

    def visits(self, name: str) -> int:
        """How often a node runs at most. A run is in a cycle's nodes as often as its stops allow."""
        cycle = self._cycle(name)
        own = self.flow.nodes[name].max_visits
        if not cycle:
            return 1
        stops = sum(self.flow.nodes[n].max_visits or 0 for n in cycle)
        entries = {end for s, ends in self.after.items() if s not in cycle for end in ends if end in cycle}
        before = any(self.flow.nodes[n].max_visits is None for n in entries)
        return own or stops + before

    def _one_way_each(self) -> None:
        seen: set[str] = set()
        for number, edge in enumerate(self.flow.edges):
            where = ("edges", number)
            if edge.source in seen:
                raise self.source.error(
                    where, f"{edge.source} has two edges", "name all ways in one: targets, or match"
                )
            seen.add(edge.source)
            if edge.source == START and (not edge.target or edge.target == END):
                raise self.source.error(where, "START leads to one node", "target: the first node")
            if edge.map and edge.map.node == END:
                raise self.source.error(where, "END cannot be mapped", "map a node")
            if edge.targets and len(set(edge.targets)) < len(edge.targets):
                raise self.source.error(where, "a target stands twice", "name it once")
        self._mapped_nodes()
        for name in (START, *self.flow.nodes):
            if name not in seen:
                where_it_is = ("edges",) if name == START else ("nodes", name)
                raise self.source.error(where_it_is, f"no edge leads on from {name}", "add one")

    def _mapped_nodes(self) -> None:
        mapped = [edge.map.node for edge in self.flow.edges if edge.map]
        for number, edge in enumerate(self.flow.edges):
            where = ("edges", number)
            if not edge.map and (both := set(edge.ends()) & set(mapped)):
                raise self.source.error(where, f"{min(both)} is mapped; only map can lead to it", "use map")
            if edge.map and mapped.count(edge.map.node) > 1:
                raise self.source.error(where, f"{edge.map.node} is mapped twice", "map two nodes")
            if edge.source in mapped and (edge.match or edge.map):
                raise self.source.error(
                    where, f"{edge.source} runs once for each item; it cannot choose the way", "join first"
                )
        for name in mapped:
            if name in self.flow.nodes and self.flow.nodes[name].max_visits:
                raise self.source.error(
                    ("nodes", name, "max_visits"),
                    "a mapped node has no visits of its own",
                    "put it before it",
                )

    def _from(self, names: Iterable[str], stop: Iterable[str] = ()) -> set[str]:
        """All that can be reached, the beginnings included; what is in `stop` is not entered."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found and name not in stop:
                found.add(name)
                waiting += self.after[name]
        return found

    def _cycle(self, name: str) -> set[str]:
        """The nodes that can be reached from this one and lead back to it; empty if none."""
        return {n for n in self._from(self.after[name]) if name in self._from(self.after[n]) and n != END}

    def _cycles_stop(self) -> None:
        bounded = [name for name, node in self.flow.nodes.items() if node.max_visits]
        for name in self.flow.nodes:
            if name not in bounded and name in self._from(self.after[name], bounded):
                round_ = [n for n in self.flow.nodes if n in self._cycle(name)]
                raise self.source.error(
                    ("nodes", name),
                    f"the cycle through {', '.join(round_)} never stops",
                    "give one of them max_visits",
                )

    def _cycles_are_left_once(self) -> None:
        """What comes after a cycle is paid for once: no way leads there beside a further round, nor from one
        of several branches.
        """
        for number, edge in enumerate(self.flow.edges):
            cycle = self._cycle(edge.source) if edge.source != START else set()
            out = [end for end in edge.ends() if end not in cycle and end != END]
            branches = any(self.edges[name].targets for name in cycle)
            if cycle and out and branches and (edge.targets or not self.flow.nodes[edge.source].defer):
                raise self.source.error(
                    ("edges", number),
                    f"{edge.source} is in a cycle; {out[0]}, which is not, would run once for each round",
                    "leave the cycle by match, from a node that waits for all branches (defer: true)",
                )

    def _joins_wait(self) -> None:
        """A node that several branches lead to waits for all of them."""
        waiting = [name for name, node in self.flow.nodes.items() if node.defer]
        for edge in self.flow.edges:
            branches = [self._from([target], waiting) for target in edge.targets or ()]
            for name in self.flow.nodes:
                into = [s for s, ends in self.after.items() if name in ends]
                joined = sum(any(s in branch for s in into) for branch in branches)
                if len(into) > 1 and joined > 1 and name not in waiting:
                    raise self.source.error(
                        ("nodes", name), f"it joins the branches of {edge.source}", "add defer: true"
                    )
