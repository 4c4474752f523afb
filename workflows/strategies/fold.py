"""Read chunk by chunk with a memory of fixed size that the model edits: MemAgent's loop.

    next -> fold -> next … -> answer

Yu et al., "MemAgent: Reshaping Long-Context LLM with Multi-Conv RL-based Memory Agent", arXiv 2507.02259.
There the model overwrites its memory freely, and what it does not repeat is lost. Ours edits it by
operations that code applies: every note keeps its verified words, and what is replaced or dropped stays in
the store. Cost: one call for each chunk and pass, and one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Failure, Plan, Span
from agentctx.workflows import cost
from agentctx.workflows.answering import answer_input, answer_pieces, answer_role, pieces_of
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.grounding import content_words
from agentctx.workflows.notes import (
    Note,
    keep_record,
    no_information,
    places_of,
    point_of,
    spans_of,
    verified,
)
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import CLAIM, Claim, Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record, State, merged

LABEL = "your memory"


class Revision(Claim):
    """A note in the place of an older one."""

    id: str = Field(max_length=20)


class FoldReply(Reply):
    """How a stretch of text changes the memory."""

    example = MappingProxyType(
        {
            "add": (CLAIM,),
            "replace": (MappingProxyType({"id": "n1", **CLAIM}),),
            "drop": ("n2",),
            "complete": False,
        }
    )

    add: list[Claim] = Field(default_factory=list, max_length=8)
    replace: list[Revision] = Field(default_factory=list, max_length=8)
    drop: list[str] = Field(default_factory=list, max_length=24)
    complete: bool = False


FOLD = Role(
    "fold",
    1,
    "You read a long source part by part and keep a short memory of what helps to answer the question. You "
    "are shown the memory, one note a line with its id, and the next part. Add what is new, with words "
    "copied exactly from this part; replace a note that this part corrects; drop one that no longer helps. "
    "Leave the lists empty if nothing changes. complete says that the memory answers the question fully.",
    FoldReply,
    500,
)


class FoldState(State, total=False):
    """`memory`: for each lane, the record of its notes; `at`: steps that are done."""

    memory: Annotated[dict[str, str], merged]
    at: int


@dataclass(frozen=True)
class Fold(Strategy):
    """`memory_tokens` is the size of the memory. `lanes` stretches are read side by side, each with its own.

    `early`: stop when the model says that the memory is complete; what is left is reported as unread.
    """

    name: ClassVar[str] = "fold"
    state: ClassVar[type[State]] = FoldState
    chunk_tokens: int | None = None
    memory_tokens: int = 512
    passes: int = 1
    lanes: int = 1
    early: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 64:
            raise ConfigError(f"chunk_tokens must be at least 64, got {self.chunk_tokens}")
        if min(self.memory_tokens, self.passes, self.lanes) < 1:
            raise ConfigError(f"memory_tokens, passes and lanes must be at least 1: {self}")

    def needs(self, scope: Scope) -> Tier:
        return "writes"

    def room(self, scope: Scope) -> int:
        """Tokens of a lane's memory; never more than a quarter of the window."""
        return min(self.memory_tokens, scope.profile.window // 4)

    def spare(self, scope: Scope) -> int:
        """Tokens that the memory adds to a prompt; those of joined texts may exceed the sum of theirs."""
        role, question = scope.role(FOLD), scope.task.question
        shown, bare = (role.render(question, pieces, scope.tag) for pieces in ([(LABEL, "")], []))
        return scope.prompt_tokens(shown) - scope.prompt_tokens(bare) + self.room(scope) * 5 // 4

    def cut(self, scope: Scope) -> Cut:
        role, question, per = scope.role(FOLD), scope.task.question, scope.task.per
        return scope.keep(
            (self, "cut"), lambda: cut(scope, role, question, per, self.chunk_tokens, self.spare(scope))
        )

    def steps(self, scope: Scope) -> int:
        """Rounds in which every lane reads its next chunk."""
        return self.passes * -(-len(self.cut(scope).reads) // self.lanes)

    def body_plan(self, scope: Scope) -> Plan:
        made, role = self.cut(scope), scope.role(FOLD)
        inputs = [read.input_tokens + self.spare(scope) for read in made.reads] * self.passes
        fold = cost.stage("fold", role.name, inputs, role.max_output, scope.profile, waves=self.steps(scope))
        stages = [fold]
        if scope.task.kind == "search":
            _, output = answer_input(scope, [])
            room = scope.profile.window - output
            stages.append(cost.stage("answer", answer_role(scope).name, [room], output, scope.profile))
        return cost.make_plan(
            self.name,
            {"chunk_tokens": made.chunk_tokens, "reads": len(made.reads), "memory_tokens": self.room(scope)},
            stages,
            largest_input=max(*inputs, scope.profile.window),
            largest_output=max(part.cost.output_tokens // part.cost.calls for part in stages),
            hold=stages[-1].cost if len(stages) > 1 else cost.NOTHING,
            coverage=1.0,
            supersteps=8 + self.steps(scope),
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "fold", self._fold)
        add_node(graph, "answer", self._answer)
        graph.add_conditional_edges("fold", lambda state: state["route"], ["fold", "answer"])
        graph.add_edge("answer", "verify")
        return "fold"

    async def _fold(self, run: RunContext, state: FoldState) -> dict[str, Any]:
        """One step of every lane."""
        at, memory = state.get("at", 0), state.get("memory", {})
        each = self.steps(run.scope) // self.passes
        numbers = [lane * each + at % each for lane in range(self.lanes)]
        lanes = [
            (lane, number)
            for lane, number in enumerate(numbers)
            if number < min(len(self.cut(run.scope).reads), (lane + 1) * each)
        ]
        results = await asyncio.gather(*(self._step(run, n, memory.get(str(lane))) for lane, n in lanes))
        update: dict[str, Any] = {"memory": {}, "reads": {}, "failures": {}, "at": at + 1}
        complete = bool(lanes)
        for (lane, number), result in zip(lanes, results, strict=True):
            if isinstance(result, Failure):
                update["failures"][str(number)] = asdict(result)
                complete = False
                continue
            key, edit = result
            update["memory"][str(lane)] = key
            update["reads"][str(number)] = edit.id
            complete &= bool(edit.data["complete"]) and bool(_notes(run, key))
        ends = at + 1 >= self.steps(run.scope) or (
            self.early and complete and run.scope.task.kind == "search"
        )
        return {**update, "route": "answer" if ends else "fold"}

    async def _step(self, run: RunContext, number: int, key: str | None) -> tuple[str, Record] | Failure:
        """Read one chunk beside the memory; the memory after it, and the reply."""
        made, notes = self.cut(run.scope), _notes(run, key)
        pieces = [(LABEL, _shown(notes)), *made.pieces(run.scope, made.reads[number])]
        reply = await ask(run, run.scope.role(FOLD), run.scope.task.question, pieces)
        if isinstance(reply, Failure):
            return reply
        spans = [made.chunks[i].span for i in made.reads[number].chunks]
        after = await asyncio.to_thread(_applied, run, notes, reply.data, spans)
        while after and run.scope.text_tokens(_shown(after)) > self.room(run.scope):
            after.remove(min(after, key=lambda note: _worth(run.scope, note)))
        return keep_record(run, "memory", {"before": key, "notes": after}), reply

    async def _answer(self, run: RunContext, state: FoldState) -> dict[str, Any]:
        notes = self._gathered(run, state)
        if run.scope.task.kind == "summarise":
            points = [point_of(note) for note in notes]
            draft = {"points": points, "no_information": not points}
            return {"draft": keep_record(run, "outline", draft)}
        if not notes:
            return {"draft": no_information(run)}
        pieces = pieces_of(run.scope, notes)
        update = await answer_pieces(run, pieces)
        return {**update, "not_forwarded": len(notes) - len(pieces)}

    def _gathered(self, run: RunContext, state: FoldState) -> list[Note]:
        """The notes of all lanes, in lane order."""
        notes = []
        for lane, key in sorted(state.get("memory", {}).items(), key=lambda entry: int(entry[0])):
            for note in _notes(run, key):
                spans = tuple(Span(*place) for place in note["places"])
                notes.append(Note(int(lane), note["text"], spans, _worth(run.scope, note)))
        return notes

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        return spans_of(self._gathered(run, cast(FoldState, state)))

    def covered(self, scope: Scope, state: State) -> Covered:
        return self.cut(scope).covered(state)


def _notes(run: RunContext, key: str | None) -> list[dict[str, Any]]:
    """The notes of a memory; each has an id, a text and the places of its words."""
    record = run.cache.get(key) if key else None
    return list(record["notes"]) if record else []


def _applied(
    run: RunContext, notes: Sequence[dict[str, Any]], edit: Mapping[str, Any], spans: Sequence[Span]
) -> list[dict[str, Any]]:
    """The memory after an edit. A note that quotes nothing of the text does not enter it."""
    known = {note["id"] for note in notes}
    named = {*edit["drop"], *(revision["id"] for revision in edit["replace"])}
    if unknown := sorted(named - known):
        run.warn(
            "unknown_note", f"an edit of the memory named notes that are not in it: {', '.join(unknown)}"
        )
    revised = {revision["id"]: revision for revision in edit["replace"]}
    after = []
    for note in notes:
        revision = revised.get(note["id"])
        places = _places(run, revision["quotes"], spans) if revision else []
        if revision and places:
            after.append({"id": note["id"], "text": revision["text"], "places": places})
        elif note["id"] not in edit["drop"]:
            after.append(note)
    last = max((int(note["id"][1:]) for note in notes), default=0)
    for claim in edit["add"]:
        if places := _places(run, claim["quotes"], spans):
            last += 1
            after.append({"id": f"n{last}", "text": claim["text"], "places": places})
    return after


def _places(run: RunContext, quotes: Sequence[str], spans: Sequence[Span]) -> list[list[Any]]:
    return places_of(verified(run, quotes, spans))


def _shown(notes: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{note['id']}: {note['text']}" for note in notes) or "(empty)"


def _worth(scope: Scope, note: Mapping[str, Any]) -> float:
    """Words that a note shares with the question: which one leaves a full memory. Of equals, the oldest."""
    return float(len(content_words(scope.task.question) & content_words(note["text"])))
