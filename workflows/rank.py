"""Find the passages that answer: a cheap look at all of them, a model's look at the best.

The first stage is BM25 over words plus BM25 over character n-grams, which finds what inflection, compounds
and typing errors hide from words; with an `Embedder`, the nearness of vectors is added. The second asks the
`Reader` how well each candidate predicts the question. The two are fused by their scores: ranks would throw
away that one candidate is far ahead.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from agentctx.memory.lexical import Lexical, grams
from agentctx.workflows.ports import Embedder, Reader, Scores

# Both were chosen on the 100 development questions of benchmarks/finding.py and on nothing else.
CANDIDATES = 50  # the right passage was among them for every question
LEXICAL_WEIGHT = 3.0  # nats per token that a full lexical match adds; 2 to 6 did about as well
# Lexical shares that a cosine of 1 is worth. By the first stage alone the right one of 598 passages came
# first for 85 of the same questions without vectors, for 95 to 97 of them with weights from 1 to 8.
EMBEDDING_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class Ranking:
    """Positions of texts, best first, and how they came to stand so.

    `scores` has one number per text: the fused score, or the first stage's if there was no reader; a text
    the reader did not look at has minus infinity and stands behind, in the first stage's order.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]
    scored: tuple[int, ...] = ()  # positions the reader looked at
    likelihoods: tuple[float, ...] = ()  # mean log P(question token | text), one per position in `scored`
    computed_tokens: int = 0
    reused_tokens: int = 0
    warnings: tuple[str, ...] = ()


class FirstStage:
    """The lexical index of some texts. Build it once if several questions are asked of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._size = len(texts)
        self._indexes = (Lexical(texts), Lexical(texts, grams))

    def scores(self, question: str) -> list[float]:
        """The share of the question that each text covers, from 0.0 to 1.0, mean of both indexes.

        A share and not a share of the best text's score: where nothing fits well, words should count little.
        """
        covered = [0.0] * self._size
        for index in self._indexes:
            ceiling = len(self._indexes) * index.ceiling(question) or 1.0
            covered = [
                share + score / ceiling for share, score in zip(covered, index.scores(question), strict=True)
            ]
        return covered


async def rank(
    question: str,
    texts: Sequence[str],
    *,
    reader: Reader | None,
    candidates: int = CANDIDATES,
    first: FirstStage | None = None,
    embedder: Embedder | None = None,
) -> Ranking:
    """Order all texts by how likely they answer, the reader looking at the best `candidates` of them.

    Costs at most `rank_cost` tokens of the reader. `first` must have been built over the same texts.
    """
    found = await first_scores(question, texts, first=first, embedder=embedder)
    cheap, chosen = found.values, _best(found.values, candidates)
    behind = sorted(range(len(texts)), key=lambda position: -cheap[position])
    if reader is None or not chosen:
        return Ranking(tuple(behind), cheap, warnings=found.warnings)
    seen = await reader.likelihood(question, [texts[position] for position in chosen])
    scores = [-math.inf] * len(texts)
    for position, likelihood in zip(chosen, seen.values, strict=True):
        scores[position] = likelihood + LEXICAL_WEIGHT * cheap[position]
    return Ranking(
        order=tuple(sorted(behind, key=lambda position: -scores[position])),
        scores=tuple(scores),
        scored=tuple(chosen),
        likelihoods=seen.values,
        computed_tokens=seen.computed_tokens,
        reused_tokens=seen.reused_tokens,
        warnings=found.warnings,
    )


async def first_scores(
    question: str,
    texts: Sequence[str],
    *,
    first: FirstStage | None = None,
    embedder: Embedder | None = None,
) -> Scores:
    """What the first stage gives each text, by words and, with an embedder, by meaning."""
    words = await asyncio.to_thread(lambda: (first or FirstStage(texts)).scores(question))
    if embedder is None or not texts:
        return Scores(tuple(words), 0, 0)
    near = await embedder.similarities(question, texts)
    both = (share + EMBEDDING_WEIGHT * cosine for share, cosine in zip(words, near.values, strict=True))
    return Scores(tuple(both), 0, 0, near.warnings)


def rank_cost(
    question: str,
    texts: Sequence[str],
    *,
    reader: Reader | None,
    candidates: int = CANDIDATES,
    first: FirstStage | None = None,
    embedder: Embedder | None = None,
) -> int:
    """The most tokens the reader computes in `rank` with the same arguments. Calls no model, so with an
    embedder any texts may be the candidates, and the dearest are counted.
    """
    if reader is None:
        return 0
    if embedder is not None:
        each = (reader.likelihood_cost(question, [text]) for text in texts)
        return sum(heapq.nlargest(candidates, each))
    chosen = _best((first or FirstStage(texts)).scores(question), candidates)
    return reader.likelihood_cost(question, [texts[position] for position in chosen])


def _best(scores: Sequence[float], candidates: int) -> list[int]:
    """The positions of the best texts, in the order of the texts."""
    return sorted(sorted(range(len(scores)), key=lambda position: -scores[position])[:candidates])
