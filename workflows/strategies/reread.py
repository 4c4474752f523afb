"""Everything in one call, and the question after each of two copies of it.

A model that reads from left to right does not know at first what it will be asked; the second copy it reads
with the question behind it. Arora et al., "Just read twice", arXiv 2407.05483, for recurrent models. `auto`
never chooses it, as no gain has been measured here. Cost: one call, of `repeats` times the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from langchain_core.messages import BaseMessage, HumanMessage

from agentctx.memory.errors import ConfigError, InputError
from agentctx.memory.types import Plan
from agentctx.workflows.answering import (
    answer_input,
    answer_pieces,
    answer_role,
    direct_plan,
    whole_pieces,
)
from agentctx.workflows.conclude import Covered
from agentctx.workflows.frame import Graph, Strategy, add_node, whole_covered
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State, TaskKind


@dataclass(frozen=True, slots=True)
class Repeated(Role):
    """A role whose prompt, texts and question, is said `times` times over."""

    inner: Role | None = None
    times: int = 2

    @classmethod
    def of(cls, role: Role, times: int) -> Repeated:
        own = {field.name: getattr(role, field.name) for field in fields(Role)}
        return cls(**{**own, "name": f"{role.name}_{times}_times"}, inner=role, times=times)

    def render(self, question: str, pieces: Sequence[tuple[str, str]], tag: str) -> list[BaseMessage]:
        assert self.inner is not None
        *before, last = self.inner.render(question, pieces, tag)
        return [*before, HumanMessage("\n\n".join([str(last.text)] * self.times))]

    def clean(self, reply: str) -> str:
        assert self.inner is not None
        return self.inner.clean(reply)


@dataclass(frozen=True)
class Reread(Strategy):
    """`repeats` copies, each with the question behind it; only where they fit what the model reads well."""

    name: ClassVar[str] = "reread"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search",)
    gives_way: ClassVar[bool] = False
    repeats: int = 2

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ConfigError(
                f"repeats must be at least 2, got {self.repeats}", hint="direct reads everything once"
            )

    def body_plan(self, scope: Scope) -> Plan:
        role = self._role(scope)
        tokens, output = answer_input(scope, whole_pieces(scope), role)
        if tokens + output > scope.profile.window:
            raise InputError(
                f"{self.repeats} copies of the input have {tokens:,} tokens as one prompt, and "
                f"{scope.profile.name} reads {scope.profile.window - output:,} well",
                code="too_large",
                hint="use --strategy auto",
            )
        return direct_plan(scope, self.name, role)

    def body(self, graph: Graph) -> str:
        add_node(graph, "read_again", self._read_again)
        graph.add_edge("read_again", "verify")
        return "read_again"

    def covered(self, scope: Scope, state: State) -> Covered:
        return whole_covered(scope, state)

    def _role(self, scope: Scope) -> Role:
        return Repeated.of(answer_role(scope), self.repeats)

    async def _read_again(self, run: RunContext, state: State) -> dict[str, Any]:
        return await answer_pieces(run, whole_pieces(run.scope), self._role(run.scope))
