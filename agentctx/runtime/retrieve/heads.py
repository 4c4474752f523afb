"""Which heads look at what a question asks for, chosen on texts where that is known.

Few heads retrieve (Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv
2404.15574), they stand in the middle of a model, and the best ones alone are not the best together. So heads
are added one at a time, by what they add on one half of the questions, while the other half agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.runtime.engine import Engine
from agentctx.runtime.retrieve.mass import query_heads
from agentctx.runtime.retrieve.spans import worth

MIDDLE = (0.45, 0.75)  # depths between which the layers of a model retrieve, where nothing better is known
MOST = 16  # heads
TRIED = 48  # heads that are best alone: the others are not tried
PATIENCE = 3  # heads in a row that the other half sees no use in, after which the search ends


def middle(layers: int, heads: int) -> Tensor:
    """The weight of each head of a model that was not calibrated, float32 `[layers, Hq]`."""
    depth = torch.arange(layers) / max(1, layers - 1)
    inside = (depth >= MIDDLE[0]) & (depth <= MIDDLE[1])
    return weighed([(int(i), h) for i in inside.nonzero()[:, 0] for h in range(heads)], layers, heads)


def weighed(chosen: Sequence[tuple[int, int]], layers: int, heads: int) -> Tensor:
    """The same weight for each of these heads `(layer, head)`, together 1: float32 `[layers, Hq]`."""
    found = torch.zeros(layers, heads)
    for layer, head in chosen:
        found[layer, head] = 1 / len(chosen)
    return found


def heads_of(engine: Engine, picked: Sequence[tuple[int, int]] | None) -> Tensor:
    """The weights of calibrated heads; None: of the middle layers' of the engine's model."""
    layers, heads = engine.pool.shape.layers, query_heads(engine)
    return middle(layers, heads) if picked is None else weighed(picked, layers, heads)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One question of a text: `mass [layers, Hq, N]`, smoothed and without what an empty question gets; the
    tokens of the text's `spans`, and which of them is `right`; the `share [layers, Hq]` of its attention that
    each head gives to it.
    """

    mass: Tensor
    spans: Sequence[range]
    right: int
    share: Tensor


def reciprocal_rank(scores: Tensor, right: int) -> Tensor:
    """1 / the place of the right span, float32 `[...]` of `[..., S]`.

    And not the area under the curve, which among seventy spans is above 0.95 for nearly every head and so
    tells them apart by little.
    """
    return 1 / (1 + (scores > scores[..., right, None]).float().sum(-1))


def first(scores: Tensor, right: int) -> Tensor:
    """Whether the right span stands first, float32 `[...]` of `[..., S]`."""
    return (scores.argmax(-1) == right).float()


def alone(asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """Of each head, `[layers, Hq]`, mean over the questions: reciprocal rank of the right span, and how often
    it is first.
    """
    scores = [worth(one.mass.float(), one.spans) for one in asked]
    both = zip(asked, scores, strict=True)
    pairs = [(reciprocal_rank(score, one.right), first(score, one.right)) for one, score in both]
    return torch.stack([a for a, _ in pairs]).mean(0), torch.stack([b for _, b in pairs]).mean(0)


def together(asked: Sequence[Asked], heads: Tensor) -> tuple[float, float]:
    """The same two figures for heads by their weights `[layers, Hq]`."""
    found = [worth(torch.tensordot(heads, one.mass.float(), 2), one.spans) for one in asked]
    pairs = [
        (reciprocal_rank(s, one.right), first(s, one.right)) for one, s in zip(asked, found, strict=True)
    ]
    return float(torch.stack([a for a, _ in pairs]).mean()), float(torch.stack([b for _, b in pairs]).mean())


def chosen(one: Sequence[Asked], other: Sequence[Asked]) -> list[tuple[int, int]]:
    """The heads, in the order in which they were added: best together on `one`, as far as `other` gains.

    Both by the mean reciprocal rank of the right span.
    """
    ranked, _ = alone(one)
    width = ranked.shape[1]
    tried = [divmod(int(index), width) for index in ranked.flatten().argsort(descending=True)[:TRIED]]
    picked: list[tuple[int, int]] = []
    best, kept = 0.0, 0
    sums: list[Tensor | None] = [None] * len(one)
    while len(picked) < min(MOST, len(tried)) and len(picked) - kept < PATIENCE:
        rest = [head for head in tried if head not in picked]
        gains = torch.zeros(len(rest))
        for index, asked in enumerate(one):
            mass = torch.stack([asked.mass[head].float() for head in rest])
            before = sums[index]
            gains += reciprocal_rank(
                worth(mass if before is None else mass + before, asked.spans), asked.right
            )
        picked.append(rest[int(gains.argmax())])
        for index, asked in enumerate(one):
            own, before = asked.mass[picked[-1]].float(), sums[index]
            sums[index] = own if before is None else own + before
        seen, _ = together(other, weighed(picked, *ranked.shape))
        if seen > best:
            best, kept = seen, len(picked)
    return picked[:kept]
