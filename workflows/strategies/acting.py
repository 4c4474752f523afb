"""A model that acts step by step under a context of fixed size: what `continue` and `experience` share.

    act -> act … -> answer

Each step is one call: the question, what was archived by its titles, what is live in full. The reply names a
tool or gives the answer. Whatever would pass the limit leaves before the call, by the strategy's own way, and
stays in the store. If the steps end without an answer, one is made of what is live.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Failure, Plan, Stage
from agentctx.workflows import cost
from agentctx.workflows.answering import Piece, answer_input, answer_pieces, answer_role
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import keep_record, no_information, places_of
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import CLAIM, Claim, Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State, TaskKind
from agentctx.workflows.tools import PASSAGE_TOKENS, TOOLS, Result
from agentctx.workflows.worklog import WorkLog

LINES = 40  # of the index that are shown


class ActReply(Reply):
    """One step."""

    example = MappingProxyType(
        {
            "thought": "why, in a sentence",
            "tool": "find",
            "arguments": MappingProxyType({"words": "..."}),
            "answer": "only at the end, and then no tool",
            "claims": (CLAIM,),
        }
    )

    thought: str = Field(default="", max_length=2000)
    tool: str = Field(default="", max_length=40)
    arguments: dict[str, str | int] = Field(default_factory=dict, max_length=6)
    answer: str = Field(default="", max_length=6000)
    claims: list[Claim] = Field(default_factory=list, max_length=24)


ACT = Role(
    "act",
    1,
    "You answer a question about sources that you cannot see whole, step by step. You are shown what you "
    "have done so far. In each step either use one tool, or give the answer with, for every claim, words "
    "copied exactly from the sources. The tools are: {tools}.",
    ActReply,
    400,
)


class ActState(State, total=False):
    """`log`: the record of the work so far; `step`: steps that are done; `summaries`: that were written."""

    log: str
    step: int
    summaries: int


@dataclass(frozen=True)
class Acting(Strategy):
    """At most `steps`; a call is shown `context_tokens` at most, and a tool gives `result_tokens` at most."""

    kinds: ClassVar[tuple[TaskKind, ...]] = ("search", "multi_hop")
    state: ClassVar[type[State]] = ActState
    steps: int = 24
    context_tokens: int = 8000
    result_tokens: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1 or self.result_tokens < 32 or self.context_tokens < 4 * self.result_tokens:
            raise ConfigError(
                f"steps is {self.steps}, result_tokens {self.result_tokens}, "
                f"context_tokens {self.context_tokens}",
                hint="at least 1 step, 32 tokens of a result, and a context of four results",
            )

    @abstractmethod
    async def compact(self, run: RunContext, log: WorkLog, state: ActState) -> dict[str, Any]:
        """Make room: archive live entries until the prompt of a step fits `limit`; an update of the state."""

    @abstractmethod
    def tools(self) -> tuple[str, ...]:
        """Names in `workflows.tools.TOOLS`."""

    def extra(self, scope: Scope) -> list[Stage]:
        """Stages of the plan besides steps and answer."""
        return []

    def needs(self, scope: Scope) -> Tier:
        return "plans"

    def role(self, scope: Scope) -> Role:
        told = "; ".join(f"{name} {TOOLS[name].usage}" for name in self.tools())
        return scope.role(_with_tools(ACT, told))

    def limit(self, scope: Scope) -> int:
        """Tokens of a step's prompt, at most: Z."""
        return min(self.context_tokens, scope.profile.window - self.role(scope).max_output)

    def most_result(self, scope: Scope) -> int:
        return min(self.result_tokens, self.limit(scope) // 4)

    def body_plan(self, scope: Scope) -> Plan:
        role, (_, output) = self.role(scope), answer_input(scope, [])
        room = scope.profile.window - output
        stages = [
            cost.stage(
                "act",
                role.name,
                [self.limit(scope)] * self.steps,
                role.max_output,
                scope.profile,
                waves=self.steps,
            ),
            *self.extra(scope),
            cost.stage("answer", answer_role(scope).name, [room], output, scope.profile),
        ]
        total = sum(chunk.tokens for chunk in self._passages(scope))
        return cost.make_plan(
            self.name,
            asdict(self),
            stages,
            largest_input=scope.profile.window,
            largest_output=max(stage.cost.output_tokens // stage.cost.calls for stage in stages),
            hold=stages[-1].cost,
            coverage=min(1.0, self.steps * self.most_result(scope) / max(1, total)),
            supersteps=8 + self.steps,
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "act", self._act)
        add_node(graph, "answer", self._answer)
        graph.add_conditional_edges("act", lambda state: state["route"], ["act", "answer", "verify"])
        graph.add_edge("answer", "verify")
        return "act"

    async def _act(self, run: RunContext, state: ActState) -> dict[str, Any]:
        """One step: make room, ask, use the tool."""
        log, step = WorkLog(run, state.get("log")), state.get("step", 0)
        update = await self.compact(run, log, state)
        reply = await ask(run, self.role(run.scope), run.scope.task.question, self.pieces(log))
        update |= {"step": step + 1, "route": "act" if step + 1 < self.steps else "answer"}
        if isinstance(reply, Failure):
            ends = not reply.retryable and reply.kind != "parse"
            log.add(f"step {step + 1} failed", f"the reply could not be used: {reply.kind}")
            failed = {"failures": {f"step {step}": asdict(reply)}} if ends else {}
            return {**update, **failed, "log": log.kept(), "route": "answer" if ends else update["route"]}
        if reply.data["answer"]:
            draft = {
                "text": reply.data["answer"],
                "claims": reply.data["claims"],
                "no_information": False,
                "shown": places_of(log.shown),
            }
            return {**update, "draft": keep_record(run, "acted", draft), "log": log.kept(), "route": "verify"}
        await self.use(run, log, reply.data)
        return {**update, "log": log.kept(), "kept": self._seen(run.scope, log)}

    async def use(self, run: RunContext, log: WorkLog, reply: Mapping[str, Any]) -> None:
        """Run the tool that a reply names; what it gives is an entry."""
        name, given = reply["tool"], reply["arguments"]
        if not self.tools():
            log.add(
                f"thought {len(log.entries) + 1}", self._fitted(run.scope, reply["thought"] or "(nothing)")
            )
            return
        if name not in self.tools():
            result = Result(f"there is no tool {name!r}; the tools are: {', '.join(self.tools())}")
        else:
            if prepare := TOOLS[name].prepare:
                await asyncio.to_thread(prepare, run.scope)
            result = TOOLS[name].run(run.scope, log, given)
        title = f"{name} {' '.join(str(value) for value in given.values())}"
        told = f"({reply['thought']})\n" if reply["thought"] else ""
        text = self._fitted(run.scope, told + result.text)
        whole = text == told + result.text
        if any(entry.title == title and entry.live for entry in log.entries):
            text = f"(this was asked before)\n{text}"
        log.add(title, text, result.shown if whole else ())

    def pieces(self, log: WorkLog) -> list[tuple[str, str]]:
        """What a step is shown of the work so far."""
        index = log.index(LINES)
        archived = [("archived", index)] if index else []
        return [*archived, *((f"{entry.id} {entry.title}", log.text(entry)) for entry in log.live)]

    def prompt_tokens(self, scope: Scope, log: WorkLog) -> int:
        return scope.prompt_tokens(self.role(scope).render(scope.task.question, self.pieces(log), scope.tag))

    async def _answer(self, run: RunContext, state: ActState) -> dict[str, Any]:
        """Without an answer of its own: one from what is live, as much of the latest as fits."""
        log = WorkLog(run, state.get("log"))
        pieces = [Piece(entry.title, log.text(entry), quoted=tuple(log.shown)) for entry in log.live]
        while pieces and sum(answer_input(run.scope, pieces)) > run.scope.profile.window:
            pieces.pop(0)
        if not pieces:
            return {"draft": no_information(run)}
        run.warn("out_of_steps", f"no answer within {self.steps} steps; one was made of what was seen last")
        return await answer_pieces(run, pieces)

    def _fitted(self, scope: Scope, text: str) -> str:
        """A result cut to its limit; head and tail stay."""
        shown, keep = text, len(text) // 2
        while keep and scope.text_tokens(shown) > self.most_result(scope):
            keep = keep * 4 // 5
            shown = f"{text[:keep]}\n[...]\n{text[len(text) - keep :]}"
        return shown

    def _passages(self, scope: Scope) -> Sequence[Chunk]:
        return scope.chunks(min(PASSAGE_TOKENS, scope.profile.window // 8))

    def covered(self, scope: Scope, state: State) -> Covered:
        return Covered(self._passages(scope), read=frozenset(state.get("kept", ())))

    def _seen(self, scope: Scope, log: WorkLog) -> list[int]:
        """Passages that were shown whole, perhaps by several results."""
        shown: dict[str, list[tuple[int, int]]] = {}
        for span in sorted(log.shown, key=lambda span: span.start):
            mine = shown.setdefault(span.document_id, [])
            if mine and span.start <= mine[-1][1]:
                mine[-1] = (mine[-1][0], max(mine[-1][1], span.end))
            else:
                mine.append((span.start, span.end))
        return [
            number
            for number, chunk in enumerate(self._passages(scope))
            if any(
                start <= chunk.span.start and chunk.span.end <= end
                for start, end in shown.get(chunk.span.document_id, ())
            )
        ]


def _with_tools(role: Role, told: str) -> Role:
    return Role(role.name, role.version, role.instruction.format(tools=told), role.schema, role.max_output)
