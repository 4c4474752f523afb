"""A workflow file as a strategy: the same frame, plan, ledger, trace and check of citations as any other.

The file says what is done; this says what it costs at most and makes the LangGraph graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, get_type_hints

from langgraph.types import Send
from typing_extensions import TypedDict

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget, Cost, Plan, Stage
from agentctx.workflows import cost
from agentctx.workflows.call import MAX_RETRIES, Terms, on_terms
from agentctx.workflows.conclude import Covered
from agentctx.workflows.definition.coverage import combined
from agentctx.workflows.definition.schema import END, Edge
from agentctx.workflows.definition.site import Folder, Result, Site, cut_of
from agentctx.workflows.definition.state import DefinitionState, joined
from agentctx.workflows.definition.wiring import Wiring, wire
from agentctx.workflows.frame import Graph, Step, Strategy, add_node
from agentctx.workflows.ledger import limit_of
from agentctx.workflows.notes import best_first, keep_record, no_information, notes_of, spans_of, stated
from agentctx.workflows.profile import Tier
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State, TaskKind, merged
from agentctx.workflows.tasks.pipeline import SHOWN

SENDS = 512  # LangGraph tasks per superstep; more items than that travel in batches


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
        return "writes" if any(site.type.needs(site) == "writes" for site in sites) else "reads"

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
            assumptions=[] if scope.counter.exact else ["tokens are estimated and raised by a quarter"],
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
            add_node(graph, site.name, self._visit(site), defer=site.node.defer)
        add_node(graph, "finish", self._finish, defer=True)
        graph.add_edge("finish", "verify")
        for name, edge in self.wiring.edges.items():
            if name in self.wiring.sites:
                self._lead_on(graph, edge)
        return self.wiring.entry

    def _lead_on(self, graph: Graph, edge: Edge) -> None:
        """Add the ways on from a node; one to a node that has used up its visits leads to the end."""
        ends = [_end(end) for end in edge.ends()]
        if edge.map:
            graph.add_conditional_edges(edge.source, self._fan_out(edge), ends)
            return
        bounded = [end for end in ends if end != "finish" and self._most(end)]
        if not edge.match and not bounded:
            for end in ends:
                graph.add_edge(edge.source, end)
            return
        graph.add_conditional_edges(edge.source, self._route(edge), list(dict.fromkeys([*ends, "finish"])))

    def _most(self, name: str) -> int | None:
        return self.wiring.flow.nodes[name].max_visits

    def _open(self, state: Any, end: str) -> bool:
        """True if a node may be visited once more."""
        most = None if end == "finish" else self._most(end)
        return most is None or state.get("visits", {}).get(end, 0) < most

    def _route(self, edge: Edge) -> Callable[[Any], list[str]]:
        def route(state: Any) -> list[str]:
            if not edge.match:
                ends = [_end(end) for end in edge.ends()]
                return [end for end in ends if self._open(state, end)] or ["finish"]
            default = _end(edge.match.default)
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

    def _visit(self, site: Site) -> Step:
        """One visit of a node: on its terms, with what it reads, to what it writes."""
        work = site.type.build(site)
        attempts = site.node.retry.attempts if site.node.retry else MAX_RETRIES + 1
        terms = Terms(attempts, site.node.timeout, site.node.cache)
        match = self.wiring.edges[site.name].match

        async def visit(run: RunContext, state: Any) -> dict[str, Any]:
            values = {port.key: state[port.key] for port in site.ports if port.key in state}
            values["items"] = state.get("items", [])
            values["taken"] = state.get("taken", {}).get(site.name, [])
            with on_terms(terms):
                result = await work(run, values)
            update = _update(site, result)
            if site.node.max_visits:
                update["visits"] = {site.name: state.get("visits", {}).get(site.name, 0) + 1}
            if match:
                said = _said(run, site, result.value, match.path)
                cases = {_word(case): end for case, end in match.cases.items()}
                update["routes"] = {site.name: _end(cases.get(said, match.default))}
            return update

        return visit

    async def _finish(self, run: RunContext, state: Any) -> dict[str, Any]:
        """The last draft that says something, with the value that an earlier one computed."""
        told = [state[self.wiring.sites[name].key] for name in reversed(state.get("told", []))]
        empty: dict[str, Any] = {"draft": no_information(run), "spans": []}
        best = next((one for one in told if _informs(run, one)), told[0] if told else empty)
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


def _end(name: str) -> str:
    return "finish" if name == END else name


def _update(site: Site, result: Result) -> dict[str, Any]:
    update: dict[str, Any] = {site.key: result.value}
    if site.kind == "answer":
        update["told"] = [site.name]
    if result.failures:
        update["failures"] = {f"{site.name}.{key}": failure for key, failure in result.failures.items()}
    for name in ("taken", "shown"):
        if numbers := list(getattr(result, name)):
            update[name] = {site.name: numbers}
    if result.not_forwarded:
        update["lost"] = {site.name: result.not_forwarded}
    if result.inner is not None:
        update["inner"] = {site.name: dict(result.inner)}
    return update


def _own(failures: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return [(key.partition(".")[2], one) for key, one in failures.items() if key.partition(".")[0] == name]


def _claims(run: RunContext, key: str) -> bool:
    data = run.cache.get(key) or {}
    return stated(data) is not None or "text" in data


def _informs(run: RunContext, value: Mapping[str, Any]) -> bool:
    data = run.cache.get(value["draft"]) or {}
    return not data.get("no_information", not (data.get("text") or stated(data)))


def _said(run: RunContext, site: Site, value: Any, path: str) -> str:
    """The field of what a node gave, as `match` compares it; "" if there is none."""
    if site.kind == "answer":
        data: Any = {"no_information": not _informs(run, value), **(run.cache.get(value["draft"]) or {})}
    else:
        data = {"count": len(value), "no_information": not value}
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return _word(data)


def _word(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
