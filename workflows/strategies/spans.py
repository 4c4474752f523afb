"""Rank passages without generating, read the best, answer from them.

    split -> rank -> answer

BM25 ranks all passages, with the vectors of an `Embedder` if there is one, the Reader's query likelihood
re-ranks the best of them (`likelihood`), and the best few are read in one call. Cost: one call, and the
tokens of the passages that were scored. `lexical` goes by words alone and scores nothing. Query likelihood:
Ponte and Croft, 1998; by a language model's probabilities: https://arxiv.org/abs/2204.07496.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Plan
from agentctx.workflows import cost
from agentctx.workflows.answering import Piece, answer_input, answer_pieces, answer_role
from agentctx.workflows.conclude import Covered
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.meter import MeteredReader, Refused
from agentctx.workflows.pick import pick_cost
from agentctx.workflows.ports import Embedder
from agentctx.workflows.rank import CANDIDATES, FirstStage, rank, rank_cost
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import State, TaskKind

Method = Literal["auto", "likelihood", "lexical"]


@dataclass(frozen=True)
class Spans(Strategy):
    """`keep` tokens of passages are read, `candidates` passages are scored, each of `passage_tokens` at most.

    `keep` None: half the reliable window for a model that writes, one passage for one that only reads.
    """

    name: ClassVar[str] = "spans"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search",)
    method: Method = "auto"
    keep: int | None = None
    candidates: int = CANDIDATES
    passage_tokens: int = 200

    def __post_init__(self) -> None:
        if self.method not in ("auto", "likelihood", "lexical"):
            raise ConfigError(f"method must be auto, likelihood or lexical, got {self.method!r}")
        if self.passage_tokens < LEAST:
            raise ConfigError(f"passage_tokens must be at least {LEAST}, got {self.passage_tokens}")
        if self.candidates < 1:
            raise ConfigError(f"candidates must be at least 1, got {self.candidates}")

    def scores(self, scope: Scope) -> bool:
        """True if the Reader re-ranks. Raises ConfigError if it should and there is none."""
        if self.method == "likelihood" and scope.reader is None:
            raise ConfigError(
                f"{scope.profile.name} cannot score text without generating",
                hint="use --strategy recursive, or lexical",
            )
        return scope.reader is not None and self.method != "lexical"

    def embedder(self, scope: Scope) -> Embedder | None:
        """What ranks by meaning, if anything does."""
        return None if self.method == "lexical" else scope.embedder

    def longest(self, scope: Scope) -> int:
        """Tokens of a passage, at most."""
        return min(self.passage_tokens, max(LEAST, scope.profile.window // 2))

    def passages(self, scope: Scope) -> list[Chunk]:
        return scope.chunks(self.longest(scope))

    def _first_stage(self, scope: Scope) -> FirstStage:
        """The lexical index of the passages, shared by the plan and the run."""
        passages = self.passages(scope)
        return scope.keep((self, "first"), lambda: FirstStage([scope.text(p.span) for p in passages]))

    def room(self, scope: Scope) -> int:
        """Tokens of passages that are read."""
        if self.keep:
            return self.keep
        return scope.profile.window // 2 if scope.profile.writes else self.longest(scope)

    def largest_prompt(self, scope: Scope) -> int:
        """Tokens that the prompt of the answer may have; passages that would pass it are left out."""
        one, output = answer_input(scope, [Piece(max(scope.labels(), key=len), "")])
        none, _ = answer_input(scope, [])
        passages = -(-self.room(scope) // self.longest(scope))
        wanted = none + passages * (one - none) + (self.room(scope) + self.longest(scope)) * 5 // 4
        return min(scope.profile.context - output, wanted)

    def body_plan(self, scope: Scope) -> Plan:
        passages = self.passages(scope)
        texts = [scope.text(passage.span) for passage in passages]
        question, profile = scope.task.question, scope.profile
        stages = []
        if self.scores(scope):
            tokens = rank_cost(
                question,
                texts,
                reader=scope.reader,
                candidates=self.candidates,
                first=self._first_stage(scope),
                embedder=self.embedder(scope),
            )
            stages.append(cost.scoring("rank", tokens, profile))
        role = answer_role(scope)
        largest, output = self.largest_prompt(scope), role.max_output
        stages.append(cost.stage("answer", role.name, [largest], output, profile))
        hold = stages[-1].cost
        if scope.reader and not profile.writes:
            longest = sorted(texts, key=len)[-1 - self.room(scope) // self.longest(scope) :]
            looked = pick_cost(question, longest, reader=scope.reader)
            stages.append(cost.scoring("pick", looked, profile))
            hold += stages[-1].cost
        return cost.make_plan(
            self.name,
            {"passages": len(passages), **asdict(self)},
            stages,
            largest_input=largest,
            largest_output=output,
            hold=hold,
            coverage=min(1.0, self.room(scope) / max(1, sum(p.tokens for p in passages))),
            supersteps=8,
            assumptions=scope.assumptions(),
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "rank", self._rank)
        add_node(graph, "answer", self._answer)
        graph.add_edge("rank", "answer")
        graph.add_edge("answer", "verify")
        return "rank"

    async def _rank(self, run: RunContext, state: State) -> dict[str, Any]:
        """Order the passages: `kept` are those to read, `scored` those the Reader saw."""
        scope = run.scope
        passages = self.passages(scope)
        texts = [scope.text(passage.span) for passage in passages]
        reader = MeteredReader(run) if self.scores(scope) else None
        question, first = scope.task.question, await asyncio.to_thread(self._first_stage, scope)
        ranked = partial(
            rank, question, texts, candidates=self.candidates, first=first, embedder=self.embedder(scope)
        )
        try:
            ranking = await ranked(reader=reader)
        except Refused as refused:
            run.warn("ranked_by_words", f"the passages were ranked without the model ({refused})")
            ranking = await ranked(reader=None)
        for warning in ranking.warnings:
            run.warn("embedding", warning)
        return {"kept": self._fitting(scope, ranking.order), "scored": sorted(ranking.scored)}

    def _fitting(self, scope: Scope, order: Sequence[int]) -> list[int]:
        """The first passage, and those after it while there is room to read them."""
        kept = list(order[:1])
        limit = self.largest_prompt(scope)
        for index in order[1:]:
            if sum(self.passages(scope)[i].tokens for i in (*kept, index)) > self.room(scope):
                break
            if answer_input(scope, self._pieces(scope, [*kept, index]))[0] > limit:
                break
            kept.append(index)
        return kept

    def _pieces(self, scope: Scope, kept: Sequence[int]) -> list[Piece]:
        """The kept passages in the order of the sources, which models read best."""
        spans = [self.passages(scope)[i].span for i in sorted(kept)]
        return [Piece(scope.label(span), scope.text(span), span) for span in spans]

    async def _answer(self, run: RunContext, state: State) -> dict[str, Any]:
        return await answer_pieces(run, self._pieces(run.scope, state["kept"]))

    def covered(self, scope: Scope, state: State) -> Covered:
        kept = frozenset(state.get("kept", ()))
        failed = kept if state.get("failures") else frozenset()
        return Covered(
            self.passages(scope), read=kept - failed, failed=failed, scored=frozenset(state.get("scored", ()))
        )
