"""Go on past the window: work, summarise what was done, and continue from the summary.

InftyThink, "Breaking the Length Limits of Long-Context Reasoning in Large Language Models", arXiv 2503.06692,
for reasoning; SUPO, "Scaling LLM Multi-turn RL with End-to-end Summarization-based Context Management", arXiv
2510.06727, for tools. Ours keeps the question verbatim in every segment and archives what a summary replaces;
a summary that cannot be used is replaced by one that code makes of the titles, never by a fresh start. Cost:
one call a step, at most `summaries` summaries, and an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Failure, Stage
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.roles import CLAIM, Claim, Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.strategies.acting import Acting, ActState
from agentctx.workflows.worklog import Entry, WorkLog

Lines = list[str]


class ProgressReply(Reply):
    """Where the work stands."""

    example = MappingProxyType(
        {
            "done": ("a step that is finished",),
            "pending": ("a step that is left",),
            "findings": (CLAIM,),
            "dead_ends": ("what did not lead on",),
            "next": "what to do now",
        }
    )

    done: Lines = Field(default_factory=list, max_length=24)
    pending: Lines = Field(default_factory=list, max_length=24)
    findings: list[Claim] = Field(default_factory=list, max_length=24)
    dead_ends: Lines = Field(default_factory=list, max_length=24)
    next: str = Field(default="", max_length=1000)


PROGRESS = Role(
    "progress",
    1,
    "You summarise the work done so far on a question, so that it can be continued from your summary alone. "
    "Keep every finding with words copied exactly from the sources.",
    ProgressReply,
    600,
)


@dataclass(frozen=True)
class Continuation(Acting):
    """`mode` "tools" acts on the sources, "reasoning" thinks in segments without tools."""

    name: ClassVar[str] = "continue"
    summaries: int = 8
    mode: Literal["tools", "reasoning"] = "tools"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("tools", "reasoning"):
            raise ConfigError(f"mode must be tools or reasoning, got {self.mode!r}")
        if self.summaries < 1:
            raise ConfigError(f"summaries must be at least 1, got {self.summaries}")

    def tools(self) -> tuple[str, ...]:
        return ("find", "grep", "read", "recall") if self.mode == "tools" else ()

    def extra(self, scope: Scope) -> list[Stage]:
        role = scope.role(PROGRESS)
        room = scope.profile.window - role.max_output
        return [cost.stage("summarise", role.name, [room] * self.summaries, role.max_output, scope.profile)]

    async def compact(self, run: RunContext, log: WorkLog, state: ActState) -> dict[str, Any]:
        """Replace what is live, but for the last entry, by a summary of it."""
        if self.prompt_tokens(run.scope, log) <= self.limit(run.scope) * 4 // 5:
            return {}
        written = state.get("summaries", 0)
        old = log.live[:-1] or log.live
        update: dict[str, Any] = {}
        text = ""
        if written < self.summaries:
            text = await self._summary(run, log, old)
            update = {"summaries": written + 1}
        for entry in old:
            log.archive(entry.id)
        log.add(f"summary {written + 1}", text or _by_code(old))
        while len(log.live) > 1 and self.prompt_tokens(run.scope, log) > self.limit(run.scope):
            log.archive(log.live[0].id)
        return update

    async def _summary(self, run: RunContext, log: WorkLog, entries: Sequence[Entry]) -> str:
        """A model's summary as text; empty if it could not be made."""
        role, question = run.scope.role(PROGRESS), run.scope.task.question
        pieces = [(f"{entry.id} {entry.title}", log.text(entry)) for entry in entries]
        room = run.scope.profile.window - role.max_output
        while (
            len(pieces) > 1 and run.scope.prompt_tokens(role.render(question, pieces, run.scope.tag)) > room
        ):
            pieces.pop(0)
        result = await ask(run, role, question, pieces)
        if isinstance(result, Failure):
            run.warn("summary_failed", f"a summary was made by code: {result.message}")
            return ""
        data = result.data
        lines = [f"done: {line}" for line in data["done"]]
        for claim in data["findings"]:
            lines.append(" ".join([f"found: {claim['text']}", *(f'"{quote}"' for quote in claim["quotes"])]))
        lines += [f"did not lead on: {line}" for line in data["dead_ends"]]
        lines += [f"left to do: {line}" for line in data["pending"]]
        if data["next"]:
            lines.append(f"next: {data['next']}")
        return self._fitted(run.scope, "\n".join(lines))


def _by_code(entries: Sequence[Entry]) -> str:
    return "\n".join(f"done: {entry.id} {entry.title}" for entry in entries[-24:])
