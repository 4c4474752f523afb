"""From the attention that tokens get to the worth of spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BOX = 8  # tokens that are averaged: attention falls on single tokens of what is meant
BEST = 8  # tokens of a span that count, so that a long span is not worse for its other words


def smoothed(mass: Tensor, places: Sequence[range]) -> Tensor:
    """The mean over a box of 8 tokens around each, of mass `[..., N]` within `places`; 0 elsewhere.

    A box at the edge of a text holds fewer tokens, and is still divided by 8.
    """
    found = torch.zeros_like(mass)
    if not mass.numel():
        return found
    flat, out = mass.reshape(-1, mass.shape[-1]), found.view(-1, mass.shape[-1])
    for place in places:
        one = slice(place.start, place.stop)
        if place:
            padded = F.pad(flat[:, one], (BOX // 2, BOX - 1 - BOX // 2))
            out[:, one] = F.avg_pool1d(padded[:, None], BOX, 1)[:, 0]
    return found


def worth(mass: Tensor, spans: Sequence[range]) -> Tensor:
    """The mean of the best 8 tokens of each span, or of all if it has fewer: `[..., S]` of `[..., N]`.

    0 for a span without tokens.
    """
    found = mass.new_zeros(*mass.shape[:-1], len(spans))
    for index, span in enumerate(spans):
        if span:
            best = mass[..., span.start : span.stop].topk(min(BEST, len(span)), dim=-1).values
            found[..., index] = best.mean(-1)
    return found
