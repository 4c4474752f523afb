"""Many readers side by side, again and again: each round every one sees what the others found.

    read ×L -> answer on the best 1, 2, 4, … -> share -> read ×L … -> verify

ExtAgents, "Scaling External Knowledge Input Beyond Context Windows of LLMs via Multi-Agent Collaboration",
arXiv 2505.21471: readers share findings, and the reducer takes twice as much until it can answer. Ours shares
verified quotes, chosen by code, and stops when an answer is grounded or a round finds nothing new. Cost: L
reads and at most ⌈log₂ L⌉ + 1 answers a round.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Cost, Failure, Plan
from agentctx.workflows import cost
from agentctx.workflows.answering import is_grounded
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.findings import LABEL, findings, room_for
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import Note, best_first, keep_record, notes_of, spans_of
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import READ, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record, State, TaskKind
from agentctx.workflows.tasks.pipeline import SHOWN
from agentctx.workflows.tasks.search import answer_doubling, doubling_stage


class AgentsState(State, total=False):
    """`rounds`: for each round that is done, the record of which read gave what."""

    rounds: list[str]


@dataclass(frozen=True)
class Agents(Strategy):
    """At most `rounds`; `findings_tokens` are shown to each reader from the second round on."""

    name: ClassVar[str] = "agents"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search", "multi_hop")
    state: ClassVar[type[State]] = AgentsState
    rounds: int = 3
    findings_tokens: int = 400
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.findings_tokens < 32:
            raise ConfigError(f"at least 1 round and 32 findings_tokens are needed: {self}")
        if self.chunk_tokens is not None and self.chunk_tokens < 64:
            raise ConfigError(f"chunk_tokens must be at least 64, got {self.chunk_tokens}")

    def needs(self, scope: Scope) -> Tier:
        return "writes"

    def shown(self, scope: Scope) -> int:
        """Tokens of findings; never more than a quarter of the window."""
        return min(self.findings_tokens, scope.profile.window // 4)

    def cut(self, scope: Scope) -> Cut:
        role, question, spare = self._role(scope), scope.task.question, room_for(self.shown(scope))
        return scope.keep(
            (self, "cut"), lambda: cut(scope, role, question, scope.task.per, self.chunk_tokens, spare)
        )

    def body_plan(self, scope: Scope) -> Plan:
        made, role, profile = self.cut(scope), self._role(scope), scope.profile
        first = [read.input_tokens for read in made.reads]
        again = [tokens + room_for(self.shown(scope)) for tokens in first]
        answers = doubling_stage(scope, len(made.reads))
        stages = [cost.stage("read", role.name, first, role.max_output, profile), answers]
        for number in range(2, self.rounds + 1):
            stages.append(cost.stage(f"read, round {number}", role.name, again, role.max_output, profile))
            stages.append(answers)
        return cost.make_plan(
            self.name,
            {"chunk_tokens": made.chunk_tokens, "reads": len(made.reads), "rounds": self.rounds},
            stages,
            largest_input=profile.window,
            largest_output=max(p.cost.output_tokens // p.cost.calls for p in stages if p.cost.calls),
            hold=answers.cost if self.rounds == 1 else Cost(),
            coverage=1.0,
            supersteps=8 + 2 * self.rounds,
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "read", self._read)
        add_node(graph, "answer", self._answer)
        graph.add_edge("read", "answer")
        graph.add_conditional_edges("answer", lambda state: state["route"], ["read", "verify"])
        return "read"

    async def _read(self, run: RunContext, state: AgentsState) -> dict[str, Any]:
        """One round of all readers."""
        made, role = self.cut(run.scope), self._role(run.scope)
        notes = best_first(await asyncio.to_thread(self._notes, run, state))
        known = [(LABEL, findings(run.scope, role, notes, self.shown(run.scope)))] if notes else []

        async def one(number: int) -> Record | Failure:
            pieces = [*known, *made.pieces(run.scope, made.reads[number])]
            result = await ask(run, role, run.scope.task.question, pieces)
            if isinstance(result, Record):
                run.see({"reads": {str(number): result.id}})
            return result

        results = await asyncio.gather(*(one(number) for number in range(len(made.reads))))
        reads = {str(n): r.id for n, r in enumerate(results) if isinstance(r, Record)}
        return {
            "rounds": [*state.get("rounds", []), keep_record(run, "round", {"reads": reads})],
            "reads": reads,
            "failures": {str(n): asdict(r) for n, r in enumerate(results) if isinstance(r, Failure)},
        }

    async def _answer(self, run: RunContext, state: AgentsState) -> dict[str, Any]:
        """Answer from all notes so far; go on only if that is not grounded and the round found something."""
        rounds = state["rounds"]
        notes = await asyncio.to_thread(self._notes, run, state)
        before = await asyncio.to_thread(self._notes, run, {"rounds": rounds[:-1]})
        update = await answer_doubling(run, best_first(notes))
        found = {span for note in notes for span in note.spans}
        new = found - {span for note in before for span in note.spans}
        ends = not new or len(rounds) >= self.rounds or run.winding_down() is not None
        if not ends:
            ends = await asyncio.to_thread(is_grounded, run, update)
        return {**update, "route": "verify" if ends else "read"}

    def _notes(self, run: RunContext, state: AgentsState) -> list[Note]:
        """Of all rounds, the last first: of equally confident notes a later one knew more."""
        made = self.cut(run.scope)
        records = [run.cache.get(key) for key in reversed(state.get("rounds", []))]
        return [note for record in records if record for note in notes_of(run, made, record["reads"])]

    def _role(self, scope: Scope) -> Role:
        return scope.role(READ)

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        notes = best_first(self._notes(run, cast(AgentsState, state)))
        notes = notes or best_first(notes_of(run, self.cut(run.scope), state.get("reads", {})))
        return spans_of(notes[:SHOWN])

    def covered(self, scope: Scope, state: State) -> Covered:
        return self.cut(scope).covered(state)
