"""Answer from passages that were read before, without reading them again.

    split -> rank -> answer

Passages are found by their words and by how near their keys are to the question (after ReKV,
https://arxiv.org/abs/2503.00540, which fetches kept KV by question; the two orders are fused by their ranks,
Cormack et al., 2009, https://doi.org/10.1145/1571941.1572114). The best are ranked by the question's
likelihood, which costs the question's tokens for each as their KV is kept, and the answer is given over the
composed KV of the first few. Cost: one call, and the question as often as passages are ranked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Plan
from agentctx.workflows import cost
from agentctx.workflows.answering import answer_pieces, answer_role
from agentctx.workflows.cache import call_key
from agentctx.workflows.meter import MeteredReader, Refused, metered
from agentctx.workflows.pick import pick_cost
from agentctx.workflows.ports import KVIndex
from agentctx.workflows.rank import LEXICAL_WEIGHT, first_scores
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State
from agentctx.workflows.strategies.spans import Spans

RANKED = 16  # passages whose likelihood is asked for
# Passages side by side. In benchmarks/results/corpus.json (12 questions, the embedded model) two answered as
# often as when read in one piece, four and eight less often, and with more the answer's distributions are
# further from those of one piece (.006, .05, .06, .10 nats for 1, 2, 4, 8; 4 questions).
COMPOSED = 2
_FUSION = 60  # of reciprocal ranks, as in the paper


@dataclass(frozen=True)
class KVRetrieval(Spans):
    """`spans` over an index: at most `passages` of its passages are composed.

    Documents that are not in the index, or not as they are now, are read as far as they are chosen; without
    any index all is read as `spans` does. The run says so in both cases.
    """

    name: ClassVar[str] = "kv_retrieval"
    candidates: int = RANKED
    most: int = COMPOSED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ConfigError(f"most must be at least 1, got {self.most}")

    def longest(self, scope: Scope) -> int:
        """As the documents were cut when they were indexed, or else they would not be found."""
        return scope.index.passage_tokens if scope.index else super().longest(scope)

    def room(self, scope: Scope) -> int:
        return min(super().room(scope), self.most * self.longest(scope))

    def indexed(self, scope: Scope) -> list[bool]:
        """For each passage, whether the index has it; none without an index."""
        index = scope.index
        if index is None:
            return []
        texts = [scope.text(passage.span) for passage in self.passages(scope)]
        return scope.keep((self.name, "indexed"), lambda: index.held(texts))

    def body_plan(self, scope: Scope) -> Plan:
        if scope.index is None:
            plan = super().body_plan(scope)
            said = "nothing is indexed: passages are read"
            return replace(plan, assumptions=(*plan.assumptions, said))
        index, passages, profile = scope.index, self.passages(scope), scope.profile
        question, texts = scope.task.question, [scope.text(passage.span) for passage in passages]
        by_length = sorted(range(len(texts)), key=lambda i: -passages[i].tokens)
        longest = [texts[i] for i in by_length[: self.candidates]]
        asked = index.nearest_cost(question) + index.reader.likelihood_cost(question, longest)
        role, largest = answer_role(scope), self.largest_prompt(scope)
        stages = [
            cost.scoring("rank", asked, profile),
            cost.stage("answer", role.name, [largest], role.max_output, profile),
        ]
        hold = stages[-1].cost
        if scope.reader and not profile.writes:
            shown = sorted(texts, key=len)[-1 - self.room(scope) // self.longest(scope) :]
            stages.append(cost.scoring("pick", pick_cost(question, shown, reader=scope.reader), profile))
            hold += stages[-1].cost
        held = sum(self.indexed(scope))
        return cost.make_plan(
            self.name,
            {"passages": len(passages), "indexed": held, **asdict(self)},
            stages,
            largest_input=largest,
            largest_output=role.max_output,
            hold=hold,
            coverage=min(1.0, self.room(scope) / max(1, sum(p.tokens for p in passages))),
            supersteps=8,
            assumptions=[f"{held} of {len(passages)} passages are indexed; the tokens of those are reused"],
        )

    async def _rank(self, run: RunContext, state: State) -> dict[str, Any]:
        scope = run.scope
        if scope.index is None:
            run.warn("not_indexed", "nothing is indexed for this model: passages are read (agentctx index)")
            return await super()._rank(run, state)
        warn_stale(run, self.indexed(scope))
        texts = [scope.text(passage.span) for passage in self.passages(scope)]
        first, question = self._first_stage(scope), scope.task.question
        found = await first_scores(question, texts, first=first, embedder=self.embedder(scope))
        lexical = found.values
        for warning in found.warnings:
            run.warn("embedding", warning)
        try:
            near = await _nearest(run, scope.index, texts, self.indexed(scope), self.candidates)
            chosen = _fused([lexical, near], self.candidates)
            reader = MeteredReader(run, reader=scope.index.reader)
            found = await reader.likelihood(scope.task.question, [texts[i] for i in chosen])
        except Refused as refused:
            run.warn("ranked_by_words", f"the passages were ranked by words alone ({refused})")
            order = _fused([lexical], len(texts))
            return {"kept": self._fitting(scope, order), "scored": []}
        scores = {
            i: value + LEXICAL_WEIGHT * lexical[i] for i, value in zip(chosen, found.values, strict=True)
        }
        order = sorted(chosen, key=lambda i: -scores[i])
        return {"kept": self._fitting(scope, order), "scored": sorted(chosen)}

    async def _answer(self, run: RunContext, state: State) -> dict[str, Any]:
        pieces = self._pieces(run.scope, state["kept"])
        index = run.scope.index
        model = index.composed([piece.text for piece in pieces]) if index else None
        return await answer_pieces(run, pieces, model=model)


def warn_stale(run: RunContext, indexed: Sequence[bool]) -> None:
    """Say what of the documents is not in the index as it is now."""
    if missing := len(indexed) - sum(indexed):
        run.warn(
            "not_indexed",
            f"{missing:,} of {len(indexed):,} passages are not in the index (new, or changed since): what is "
            "chosen of them is read; `agentctx index` brings it up to date",
        )


async def _nearest(
    run: RunContext, index: KVIndex, texts: Sequence[str], indexed: Sequence[bool], k: int
) -> list[float]:
    """How near each passage is by its keys; kept, so that a resumed run asks no second time."""
    question = run.scope.task.question
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    fingerprint = run.scope.profile.fingerprint
    held = "".join("01"[held] for held in indexed)  # what is indexed later is ranked anew
    key = call_key(model=fingerprint, role="nearest", question=question, texts=digest, held=held, k=k)
    known = run.cache.get(key)
    if known is None:
        found = await metered(run, index.nearest_cost(question), lambda: index.nearest(question, texts, k))
        known = {str(i): value for i, value in enumerate(found.values) if value > float("-inf")}
        run.cache.put(key, known)
    return [known.get(str(i), float("-inf")) for i in range(len(texts))]


def _fused(scorings: Sequence[Sequence[float]], k: int) -> list[int]:
    """The `k` best positions by the sum of reciprocal ranks."""
    total = [0.0] * len(scorings[0])
    for scores in scorings:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        for place, i in enumerate(order):
            if scores[i] > float("-inf"):
                total[i] += 1 / (_FUSION + place)
    return sorted(range(len(total)), key=lambda i: -total[i])[:k]
