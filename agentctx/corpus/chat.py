"""A chat model that knows passages of its prompts already (after Prompt Cache, Gim et al., arXiv 2311.04934).

The prompt is the ordinary one, token for token, so plans and budgets hold as they are. Where a passage stands
in it whose KV is kept, its keys are moved there and nothing is computed; the rest is computed around it, in
order. Passages did not see each other or what stands around them when they were read. Where the edge of a
passage has other tokens in the prompt, because the tokenizer joined it with what is beside it, those are
computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agentctx.memory.kv.dtype import Keep
from agentctx.models.local import LocalChat
from agentctx.reading.sources import Source, gathered
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

    `repair`: tokens at the beginning of each passage that are computed anew all the same.
    """

    kept: tuple[Kept, ...] = Field(exclude=True, repr=False)
    keep: Keep = True
    repair: int = 0

    def _begin(self, prompt: list[int], cancelled: threading.Event) -> tuple[Context, Tensor | None]:
        known = list(stretches(prompt, self.kept, self.repair))
        if not known:
            return super()._begin(prompt, cancelled)
        ends = [*(one.start for one in known[1:]), len(prompt)]
        context, hidden = self.weights.engine.begin(prompt[: known[0].start], keep=True, cancelled=cancelled)
        computed, warnings = context.computed, list(context.warnings)
        try:
            for one, end in zip(known, ends, strict=True):
                if hidden is None:
                    break
                source, read = self._source(one, cancelled)
                computed += read.computed
                warnings += read.warnings
                if read.computed:
                    warnings.append("a passage was not kept any more: it was read again")
                context = self._followed(context, source, prompt[: one.end])
                if one.end < end:
                    hidden = context.feed(prompt[one.end : end], cancelled=cancelled)
                    computed += end - one.end
        except BaseException:
            context.close()
            raise
        context.computed, context.reused = computed, max(0, len(prompt) - computed)
        context.warnings = list(dict.fromkeys(warnings))
        return context, hidden

    def _source(self, one: Stretch, cancelled: threading.Event) -> tuple[Source, Context]:
        """What is kept of a stretch, to be moved to its place, and what it took to hold it (closed)."""
        engine = self.weights.engine
        held = engine.read(one.kept.ids, keep=self.keep, cancelled=cancelled)
        try:
            past = Source.of(engine, held.table).past
        finally:
            held.close()
        at = torch.arange(len(held.ids))
        used = (at >= one.first) & (at < one.first + one.end - one.start)
        return Source(past, used, (at - one.first + one.start).clamp_min(0)), held

    def _followed(self, context: Context, source: Source, ids: Sequence[int]) -> Context:
        """A context that goes on after `ids`: what `context` holds, and the source. Closes both."""
        engine = self.weights.engine
        sources = [source]
        try:
            if context.table.tokens:
                sources.insert(0, Source.of(engine, context.table))
            if past := context.state.pasts[0]:
                sources.insert(0, Source(past.share(), torch.ones(past.longest, dtype=torch.bool)))
            joined = gathered(engine, sources, ids, len(ids))
        finally:
            for one in sources:
                one.close(engine)
        context.close()
        return joined


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
