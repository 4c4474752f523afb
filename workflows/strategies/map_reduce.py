"""Read every chunk on its own, then answer or merge from what the reads noted.

    cut -> read ×L -> answer                  search: on the best 1, 2, 4, … notes until grounded
                   -> reduce … -> finish      summarise: a tree of merges

Cost: L reads and, for a search, at most ⌈log₂ L⌉ + 1 answers; for a summary R merges (`workflows.cost`).
The typed combinators follow lambda-RLM (recursive language models over typed operators); the cost model is
our own, because the published one makes many times the calls it plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from langgraph.types import Send

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Failure, Plan, Stage
from agentctx.workflows import cost
from agentctx.workflows.answering import answer_input, answer_pieces, answer_role, is_grounded
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import (
    best_first,
    keep_record,
    merge_level,
    no_information,
    notes_of,
    outline,
    pieces_of,
    spans_of,
)
from agentctx.workflows.roles import GIST, MERGE, READ, SHORT_ANSWER, SUMMARISE, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Part, Record, State

SENDS = 512  # LangGraph tasks per superstep; more reads than that travel in batches
SHOWN = 3  # notes whose quotes are shown when no answer could be made of them
GIST_TOKENS = 300  # a model that only reads is given short chunks


@dataclass(frozen=True)
class MapReduce(Strategy):
    """`chunk_tokens` None: as large as the window allows. `quorum`: share of reads that must succeed."""

    name: ClassVar[str] = "map_reduce"
    chunk_tokens: int | None = None
    fan_in: int | None = None
    quorum: float = 0.5

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 64:
            raise ConfigError(f"chunk_tokens must be at least 64, got {self.chunk_tokens}")
        if self.fan_in is not None and self.fan_in < 2:
            raise ConfigError(f"fan_in must be at least 2, got {self.fan_in}")
        if not 0 <= self.quorum <= 1:
            raise ConfigError(f"quorum must be between 0 and 1, got {self.quorum}")

    def per(self, scope: Scope) -> Part:
        """How the input is divided into named parts."""
        return scope.task.per

    def cut(self, scope: Scope) -> Cut:
        role = self.read_role(scope)
        limit = self.chunk_tokens or (None if scope.profile.writes else GIST_TOKENS)
        return scope.keep((self, "cut"), lambda: cut(scope, role, self.per(scope), limit))

    def read_role(self, scope: Scope) -> Role:
        if scope.task.kind == "search":
            return scope.role(READ if scope.profile.writes else SHORT_ANSWER)
        return scope.role(SUMMARISE if scope.profile.writes else GIST)

    def merge_fan_in(self, scope: Scope) -> int:
        """How many summaries fit one merge, each taken at its cap."""
        merge, record = scope.role(MERGE), scope.role(SUMMARISE).max_output
        empty = scope.prompt_tokens(merge.render(scope.task.question, [("notes 10", "")], scope.tag))
        label = empty - scope.prompt_tokens(merge.render(scope.task.question, [], scope.tag))
        room = scope.profile.window - merge.max_output - empty
        return min(self.fan_in or 64, room // (record + label))

    def body_plan(self, scope: Scope) -> Plan:
        made = self.cut(scope)
        role = self.read_role(scope)
        inputs = [read.input_tokens for read in made.reads]
        stages = [cost.stage("read", role.name, inputs, role.max_output, scope.profile)]
        largest = [max(inputs), role.max_output]
        if scope.task.kind == "search":
            finish = self._answer_stage(scope, len(inputs))
        else:
            finish = self._merge_stage(scope, made)
        if finish.cost.calls:
            stages.append(finish)
            largest[0] = max(largest[0], scope.profile.window - largest[1])
            largest[1] = max(largest[1], finish.cost.output_tokens // finish.cost.calls)
        return cost.make_plan(
            self.name,
            {"chunk_tokens": made.chunk_tokens, "reads": len(made.reads), "parts": len(made.parts)},
            stages,
            largest_input=largest[0],
            largest_output=largest[1],
            hold=finish.cost,
            coverage=1.0,
            supersteps=8 + len(self._tree(scope, made).levels),
            assumptions=[] if scope.counter.exact else ["tokens are estimated and raised by a quarter"],
        )

    def _answer_stage(self, scope: Scope, reads: int) -> Stage:
        """Doubling: 1, 2, 4, … notes, each at its cap, never more than the window takes."""
        role = answer_role(scope)
        empty, output = answer_input(scope, [])
        if not scope.profile.writes:  # its best short answer is taken as it is
            return cost.stage("answer", role.name, [], output, scope.profile)
        sizes = [min(2**k, reads) for k in range((reads - 1).bit_length() + 1)]
        room = scope.profile.window - output
        inputs = [min(room, empty + size * (scope.role(READ).max_output + 64)) for size in sizes]
        return cost.stage("answer", role.name, inputs, output, scope.profile, waves=len(inputs))

    def _tree(self, scope: Scope, made: Cut) -> cost.Tree:
        """All levels of all parts together; a model that does not write merges nothing."""
        if scope.task.kind == "search" or not scope.profile.writes:
            return cost.Tree(())
        fan_in = self.merge_fan_in(scope)
        levels: list[int] = []
        for part in range(len(made.parts)):
            mine = cost.tree(sum(read.part == part for read in made.reads), fan_in).levels
            for depth, count in enumerate(mine):
                if depth == len(levels):
                    levels.append(0)
                levels[depth] += count
        return cost.Tree(tuple(levels))

    def _merge_stage(self, scope: Scope, made: Cut) -> Stage:
        merges = self._tree(scope, made).merges
        role = scope.role(MERGE)
        room = scope.profile.window - role.max_output
        return cost.stage("merge", role.name, [room] * merges, role.max_output, scope.profile)

    def body(self, graph: Graph) -> str:
        add_node(graph, "cut", self._cut)
        add_node(graph, "read", self._read)
        add_node(graph, "answer", self._answer)
        add_node(graph, "reduce", self._reduce)
        graph.add_conditional_edges("cut", _fan_out, ["read"])
        graph.add_edge("read", "gather")
        add_node(graph, "gather", self._gather)
        graph.add_conditional_edges("gather", lambda state: state["route"], ["answer", "reduce"])
        graph.add_edge("answer", "verify")
        graph.add_conditional_edges("reduce", lambda state: state["route"], ["reduce", "verify"])
        return "cut"

    async def _cut(self, run: RunContext, state: State) -> dict[str, Any]:
        return {"n_reads": len(self.cut(run.scope).reads)}

    async def _read(self, run: RunContext, state: State) -> dict[str, Any]:
        """One batch of reads, each an independent call."""
        made = self.cut(run.scope)
        role = self.read_role(run.scope)
        numbers = range(*state["batch"])

        async def one(number: int) -> tuple[int, Record | Failure]:
            pieces = made.pieces(run.scope, made.reads[number])
            result = await ask(run, role, run.scope.task.question, pieces)
            if isinstance(result, Record):
                run.see({"reads": {str(number): result.id}})
            return number, result

        results = await asyncio.gather(*(one(number) for number in numbers))
        return {
            "reads": {str(n): r.id for n, r in results if isinstance(r, Record)},
            "failures": {str(n): asdict(r) for n, r in results if isinstance(r, Failure)},
        }

    async def _gather(self, run: RunContext, state: State) -> dict[str, Any]:
        """All reads are in: go on to answer, or to merge part by part."""
        made = self.cut(run.scope)
        done = state.get("reads", {})
        if len(done) < self.quorum * len(made.reads):
            run.warn("quorum", f"only {len(done)} of {len(made.reads)} reads succeeded")
        if run.scope.task.kind == "search":
            return {"route": "answer"}
        groups: list[list[str]] = [[] for _ in made.parts]
        for number, read in enumerate(made.reads):
            if str(number) in done:
                groups[read.part].append(done[str(number)])
        return {"route": "reduce", "groups": groups}

    async def _answer(self, run: RunContext, state: State) -> dict[str, Any]:
        """Answer from the best 1, 2, 4, … notes; the first answer that code finds grounded ends it."""
        notes = best_first(notes_of(run, self.cut(run.scope), state.get("reads", {})))
        if notes and not run.scope.profile.writes:
            return {"draft": keep_record(run, "note", {"text": notes[0].text}), "spans": spans_of(notes[:1])}
        best_reads = list(dict.fromkeys(note.read for note in notes))
        update: dict[str, Any] = {"draft": no_information(run)}
        size = 1
        while best_reads:
            chosen = [note for note in notes if note.read in best_reads[:size]]
            pieces = pieces_of(run.scope, chosen)
            update = await answer_pieces(run, pieces)
            update["not_forwarded"] = len(chosen) - len(pieces)
            if size >= len(best_reads) or is_grounded(run, update):
                break
            size *= 2
        return update if "draft" in update else {**update, "spans": spans_of(notes[:SHOWN])}

    async def _reduce(self, run: RunContext, state: State) -> dict[str, Any]:
        """One level of the tree, all parts at once; at the top the parts' points become the draft."""
        groups = state["groups"]
        if run.scope.profile.writes and any(len(group) > 1 for group in groups):
            fan_in = self.merge_fan_in(run.scope)
            groups = list(await asyncio.gather(*(merge_level(run, group, fan_in) for group in groups)))
            if any(len(group) > 1 for group in groups):
                return {"route": "reduce", "groups": groups}
        draft, left_out = outline(run, self.cut(run.scope), groups, state.get("reads", {}))
        return {"route": "verify", "groups": groups, "draft": draft, "not_forwarded": left_out}

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        notes = best_first(notes_of(run, self.cut(run.scope), state.get("reads", {})))
        return spans_of(notes[:SHOWN])

    def covered(self, scope: Scope, state: State) -> Covered:
        made = self.cut(scope)

        def chunks_of(numbers: Iterable[str]) -> frozenset[int]:
            return frozenset(i for n in numbers for i in made.reads[int(n)].chunks)

        failures = {n: f["kind"] for n, f in state.get("failures", {}).items() if n != "answer"}
        failed = [n for n, kind in failures.items() if kind not in ("cancelled", "budget")]
        return Covered(
            made.chunks,
            read=chunks_of(state.get("reads", {})),
            failed=chunks_of(failed),
            not_forwarded=state.get("not_forwarded", 0),
        )


def _fan_out(state: State) -> list[Send]:
    """At most SENDS tasks, each a contiguous batch of read numbers."""
    reads = state["n_reads"]
    size = -(-reads // SENDS)
    return [Send("read", {"batch": [at, min(at + size, reads)]}) for at in range(0, reads, size)]
