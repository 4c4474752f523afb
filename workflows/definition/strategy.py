"""A workflow file as a strategy: the same frame, plan, ledger, trace and check of citations as any other.

The file says what is done; this says what it costs at most and makes the LangGraph graph of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, get_type_hints

from typing_extensions import TypedDict

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget, Cost, Plan, Stage
from agentctx.workflows import cost
from agentctx.workflows.conclude import Covered
from agentctx.workflows.definition.coverage import combined
from agentctx.workflows.definition.site import Folder, Site, cut_of
from agentctx.workflows.definition.state import DefinitionState, joined
from agentctx.workflows.definition.visit import informs, visit
from agentctx.workflows.definition.ways import Ways
from agentctx.workflows.definition.wiring import Wiring, wire
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.ledger import limit_of
from agentctx.workflows.notes import best_first, keep_record, no_information, notes_of, spans_of, stated
from agentctx.workflows.profile import Tier
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State, TaskKind, merged
from agentctx.workflows.tasks.pipeline import SHOWN


@dataclass(frozen=True, eq=False)
class Definition(Strategy):
    """Made by `open_definition`. `files` are the texts of the file `entry` and of all that it names."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("search",)
    entry: str
    files: Mapping[str, str]
    chain: tuple[str, ...] = ()  # of a file inside another: those that lead to it

    @cached_property
    def wiring(self) -> Wiring:
        return wire(Folder(self.files, self.entry, tuple(self.chain)))

    def check(self) -> None:
        """Raises ConfigError, with file, line, key and remedy, if the file is not right."""
        self.state  # noqa: B018 - builds everything

    @property
    def name(self) -> str:
        return self.wiring.flow.name

    @property
    def listed(self) -> str:
        return "definition"

    @property
    def question(self) -> str | None:
        """The question that the file brings."""
        return self.wiring.flow.question

    @property
    def depth(self) -> int:
        return max((1 + s.inner.depth for s in self.wiring.sites.values() if s.inner), default=0)

    @cached_property
    def state(self) -> type[State]:
        """With a key for what each node gives: `last` keeps the last visit's, `append` joins them."""
        fields: dict[str, Any] = get_type_hints(DefinitionState, include_extras=True)
        for site in self.wiring.sites.values():
            declared = self.wiring.flow.state.get(site.key)
            append = site.type.mapped if declared is None else declared.reducer == "append"
            kind: Any = list[int] if site.kind == "chunks" else dict[str, Any]
            reducer = joined if site.kind == "chunks" else merged
            fields[site.key] = Annotated[kind, reducer] if append else kind
        typed_dict: Any = TypedDict  # whose keys a type checker cannot know
        made: type[State] = typed_dict(f"{self.name}_state", fields, total=False)
        return made

    @property
    def replies(self) -> bool:
        """True if it ends with an answer in words to the question, as one direct call would."""
        return all(site.type.replies(site) for site in self.wiring.last)

    def direct(self, scope: Scope) -> bool:
        return self.replies and super().direct(scope)

    def allowed(self, budget: Budget) -> Budget:
        """The smaller of what the caller and the file allow, in each dimension."""
        own = self.wiring.flow.budget

        def least(given: Any, mine: Any) -> Any:
            return min((one for one in (given, mine) if one is not None), default=None)

        return Budget(
            least(budget.calls, own.calls),
            least(budget.input_tokens, own.input_tokens),
            least(budget.output_tokens, own.output_tokens),
            least(budget.seconds, own.seconds),
            budget.depth,
        )

    def needs(self, scope: Scope) -> Tier:
        sites = self.wiring.sites.values()
        wanted = {site.inner.needs(scope) if site.inner else site.type.needs(site) for site in sites}
        return "writes" if "writes" in wanted else "reads"

    def body_plan(self, scope: Scope) -> Plan:
        stages: list[Stage] = []
        hold = Cost()
        for site in self.wiring.sites.values():
            mine = [_times(stage, site.visits) for stage in site.type.ceiling(site, scope)]
            hold += sum((stage.cost for stage in mine if site.type.finishing), Cost())
            stages += mine
        calling = [stage for stage in stages if stage.cost.calls]
        _affordable(scope, calling)
        reads = [read.input_tokens for split in self._splits() for read in cut_of(split, scope).reads]
        return cost.make_plan(
            self.name,
            {"file": self.entry, "nodes": len(self.wiring.sites)},
            stages or [Stage("code", "", Cost())],
            largest_input=max([scope.profile.window, *reads]),
            largest_output=max([s.cost.output_tokens // s.cost.calls for s in calling], default=0),
            hold=hold,
            coverage=self._share(scope),
            supersteps=10 + sum(site.visits for site in self.wiring.sites.values()),
            assumptions=scope.assumptions(reads=True),
        )

    def _splits(self) -> list[Site]:
        return [site for site in self.wiring.sites.values() if site.readers]

    def _share(self, scope: Scope) -> float:
        """The part of the input that is read verbatim, at most."""
        shares = [0.0]
        for site in self.wiring.sites.values():
            if site.inner:
                shares.append(site.inner.body_plan(scope).coverage)
            for port in site.ports:
                if port.kind == "chunks" and site.type.asks and port.origin:
                    reads = len(cut_of(port.origin, scope).reads)
                    shares.append(min(1.0, port.most(scope) * site.visits / max(1, reads)))
        return max(shares)

    def body(self, graph: Graph) -> str:
        for site in self.wiring.sites.values():
            add_node(graph, site.name, visit(site, self.wiring.edges[site.name].match), defer=site.node.defer)
        add_node(graph, "finish", self._finish, defer=True)
        graph.add_edge("finish", "verify")
        ways = Ways(graph, self.wiring)
        for name, edge in self.wiring.edges.items():
            if name in self.wiring.sites:
                ways.add(edge)
        return self.wiring.entry

    async def _finish(self, run: RunContext, state: Any) -> dict[str, Any]:
        """The last draft that says something, with the value that an earlier one computed."""
        told = [state[self.wiring.sites[name].key] for name in reversed(state.get("told", []))]
        empty: dict[str, Any] = {"draft": no_information(run), "spans": []}
        best = next((one for one in told if informs(run, one)), told[0] if told else empty)
        data = run.cache.get(best["draft"]) or {}
        values = [found["value"] for one in told if "value" in (found := run.cache.get(one["draft"]) or {})]
        if values and "value" not in data:
            best = {**best, "draft": keep_record(run, "finish", {**data, "value": values[0]})}
        return {**best, "not_forwarded": sum(state.get("lost", {}).values())}

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        kept: Any = state
        notes = []
        for site in self.wiring.sites.values():
            if site.type.mapped and site.kind == "records" and site.origin:
                records = {n: key for n, key in kept.get(site.key, {}).items() if _claims(run, key)}
                notes += notes_of(run, cut_of(site.origin, run.scope), records)
        return spans_of(best_first(notes)[:SHOWN])

    def covered(self, scope: Scope, state: State) -> Covered:
        """What all nodes read of the text, whatever they cut it into."""
        kept: Any = state
        parts = []
        for site in self.wiring.sites.values():
            if site.inner and site.name in kept.get("inner", {}):
                inner = site.inner.chosen(scope)
                parts.append(inner.covered(scope, kept["inner"][site.name]))
            weighed, origin = kept.get("weighed", {}).get(site.name), site.origin
            if weighed and origin:
                made = cut_of(origin, scope)
                parts.append(Covered(made.chunks, scored=made.chunks_of(weighed)))
            if not site.type.asks:
                continue
            for split in {port.origin for port in site.ports if port.kind == "chunks" and port.origin}:
                own = {n: f for n, f in _own(kept.get("failures", {}), site.name) if n.isdigit()}
                read = dict.fromkeys(map(str, kept.get("shown", {}).get(site.name, [])), "")
                if site.type.mapped:
                    read |= kept.get(site.key, {})
                seen: State = {"reads": read, "failures": own}
                parts.append(cut_of(split, scope).covered(seen))
        left_out = sum(kept.get("lost", {}).values())
        return replace(combined(parts or [Covered(scope.whole())]), not_forwarded=left_out)


def _times(stage: Stage, visits: int) -> Stage:
    return replace(stage, cost=stage.cost * visits, seconds=stage.seconds * visits)


def _affordable(scope: Scope, stages: list[Stage]) -> None:
    """Refuse a budget that pays for no call at all."""
    if not stages:
        return
    calls = [
        Cost(1, s.cost.input_tokens // s.cost.calls, s.cost.output_tokens // s.cost.calls) for s in stages
    ]
    least = Cost(1, min(c.input_tokens for c in calls), min(c.output_tokens for c in calls))
    limit = limit_of(scope.budget, least)
    for name in ("calls", "input_tokens", "output_tokens"):
        allowed, needed = getattr(limit, name), getattr(least, name)
        if allowed < needed:
            what = name.replace("_", " ")
            raise ConfigError(
                f"the budget of {allowed:,} {what} pays for no call; the smallest takes up to {needed:,}",
                hint=f"raise {name} in the file's budget, or --max-{name.replace('_', '-')}",
            )


def _own(failures: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return [(key.partition(".")[2], one) for key, one in failures.items() if key.partition(".")[0] == name]


def _claims(run: RunContext, key: str) -> bool:
    data = run.cache.get(key) or {}
    return stated(data) is not None or "text" in data
