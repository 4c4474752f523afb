"""A chat model that knows passages of its prompts already (after Prompt Cache, Gim et al., arXiv 2311.04934).

The prompt is the ordinary one, token for token, so plans and budgets hold as they are. Where a passage stands
in it whose KV is kept, its keys are moved there and nothing is computed; the rest is computed around it, in
order. Passages did not see each other or what stands around them when they were read. Where the edge of a
passage has other tokens in the prompt, because the tokenizer joined it with what is beside it, those are
computed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from agentctx.corpus import blend
from agentctx.memory.kv.dtype import Keep
from agentctx.models.local import LocalChat
from agentctx.reading.sources import appended
from agentctx.runtime.context import Context

EDGE = 4  # tokens at either end of a passage that may differ in a prompt


class Kept(NamedTuple):
    """Tokens that were read and kept, and where among them a passage stands."""

    ids: tuple[int, ...]
    first: int
    end: int


class Stretch(NamedTuple):
    """The tokens from `start` to `end` of a prompt are those of `kept` from `first` on."""

    start: int
    end: int
    kept: Kept
    first: int


class ComposedChat(LocalChat):
    """Made by `Index.composed`. What is kept of the passages is reused, whichever call has them.

    `repair`: tokens at the beginning of each passage that are computed anew all the same. `recompute`: the
    share of a passage's tokens that is, those which what stands before them changes most (`corpus.blend`).
    """

    kept: tuple[Kept, ...] = Field(exclude=True, repr=False)
    keep: Keep = True
    repair: int = 0
    recompute: float = Field(0.0, ge=0, le=1)

    def _begin(self, prompt: list[int], cancelled: threading.Event) -> tuple[Context, Tensor | None]:
        known = list(stretches(prompt, self.kept, self.repair))
        if not known:
            return super()._begin(prompt, cancelled)
        engine = self.weights.engine
        engine.fits(len(prompt))
        ends = [*(one.start for one in known[1:]), len(prompt)]
        context, hidden = engine.begin(prompt[: known[0].start], keep=True, cancelled=cancelled)
        try:
            for one, end in zip(known, ends, strict=True):
                if hidden is None:
                    break
                self._compose(context, one, prompt, cancelled)
                if one.end < end:
                    hidden = context.feed(prompt[one.end : end], cancelled=cancelled)
        except BaseException:
            context.close()
            raise
        context.reused = max(0, len(prompt) - context.computed)
        context.warnings = list(dict.fromkeys(context.warnings))
        return context, hidden

    def _compose(
        self, context: Context, one: Stretch, prompt: Sequence[int], cancelled: threading.Event
    ) -> None:
        """Go on with what is kept of a stretch, read again if it has to be."""
        ids = prompt[one.start : one.end]
        held = self.weights.engine.read(one.kept.ids, keep=self.keep, cancelled=cancelled)
        try:
            context.computed += held.computed
            context.warnings += held.warnings
            if held.computed:
                context.warnings.append("a passage was not kept any more: it was read again")
            if len(held.ids) < one.first + len(ids):
                return  # cancelled
            k, v = appended(context, held.table, range(one.first, one.first + len(ids)))
            context.ids += ids
            if most := math.ceil(len(ids) * self.recompute):
                places = self._far(context, one.start, k, v).topk(most).indices.cpu().sort().values
                blend.compute_anew(context, places + one.start)
        finally:
            held.close()

    def _far(self, context: Context, start: int, k: Tensor, v: Tensor) -> Tensor:
        """How much each token of a context from `start` on is in need of being computed anew."""
        return blend.changes(context, start, k, v)


def stretches(prompt: Sequence[int], kept: Sequence[Kept], repair: int = 0) -> Iterator[Stretch]:
    """Where passages stand in a prompt, in its order; each once, without overlap, never its last token."""
    whole = np.asarray(prompt, "<i4").tobytes()
    found = []
    for one in kept:
        core = np.asarray(one.ids[one.first + EDGE : one.end - EDGE], "<i4").tobytes()
        place = whole.find(core) if core else -1
        while place % 4 and place >= 0:
            place = whole.find(core, place + 1)
        if place < 0:
            continue
        start, first = place // 4, one.first + EDGE
        end = start + len(core) // 4
        while start > 0 and first > one.first and prompt[start - 1] == one.ids[first - 1]:
            start, first = start - 1, first - 1
        while end < len(prompt) and (at := first + end - start) < one.end and prompt[end] == one.ids[at]:
            end += 1
        found.append(Stretch(start + repair, min(end, len(prompt) - 1), one, first + repair))
    last = 1  # something stands before the first
    for stretch in sorted(found, key=lambda stretch: stretch.start):
        if last <= stretch.start < stretch.end:
            yield stretch
            last = stretch.end
