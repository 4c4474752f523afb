"""Our store as a transformers cache, so that a model and `generate` work on it unchanged.

A model calls `update` before its attention function and hands on what it returns; the function never sees the
cache. So `update` returns the new keys with one attribute that names the layer, and the attention function
stores and attends in one go. A key whose mark was lost on the way must not pass for a forward pass without a
cache: the layer stays pending, and its next `update`, or the end of the step, raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.rotation import Rotation
from agentctx.runtime.state import KVState

MARK = "_agentctx_layer"


class KVLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `PagedCache`."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.index = index
        self.pending = False

    @property
    def rotation(self) -> Rotation | None:
        return self.cache.rotations[self.index] if self.cache.rotations else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the pool exists."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, marked."""
        self.cache.check()
        self.pending = True
        marked = key_states.detach()  # a mark of ours must not stay on a tensor of the model
        setattr(marked, MARK, self)
        return marked, value_states

    def get_seq_length(self) -> int:
        return self.cache.seen(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """A cache of pages for `generate` or a plain forward pass; rows are made at the first call.

    `state` may be given to continue from what is stored; `rotations`, one for each layer, for methods that
    move positions. Not compileable.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        method: Dense | None = None,
        state: KVState | None = None,
        rotations: Sequence[Rotation | None] = (),
    ) -> None:
        self.own = [KVLayer(self, index) for index in range(pool.shape.layers)]
        super().__init__(layers=list(self.own))
        self.pool = pool
        self.rotations = rotations
        self.method = method or Dense()
        self.state = state

    def seen(self, layer: int) -> int:
        """Columns that a layer has seen, padding included."""
        return self.state.layer_lengths[layer] if self.state else 0

    def rows(self, batch: int, mask: Tensor | None) -> KVState:
        """The state of this batch, made at the first layer of the first pass."""
        if self.state is None:
            tables = [BlockTable(self.pool) for _ in range(batch)]
            self.state = KVState(self.pool, tables, self.method, [-pad for pad in pads_of(mask, batch)])
        if len(self.state.tables) != batch:
            raise ModelError(
                f"the cache holds {len(self.state.tables)} rows, the batch has {batch}",
                hint="use a cache for one batch only",
            )
        if mask is not None and [-pad for pad in pads_of(mask, batch)] != self.state.shifts:
            raise ModelError(
                "the attention mask hides tokens that the cache holds",
                code="unsupported",
                hint="pad on the left, in the first call",
            )
        return self.state

    def check(self) -> None:
        """Raise ModelError (unsupported) if keys of the last step never reached the attention function."""
        lost = [layer.index for layer in self.own if layer.pending]
        if lost:
            raise ModelError(
                f"layer {lost[0]} of this model does not hand its keys to the attention function",
                code="unsupported",
                hint="choose a model of a supported family (README, models)",
            )

    def reset(self) -> None:
        if self.state:
            self.state.close()
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; as in transformers, their number is negative."""
        if self.state and tokens_to_remove:
            self.state.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state:
            self.state.select([int(row) for row in indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state:
            self.batch_select_indices(torch.arange(len(self.state.tables)).repeat_interleave(repeats))


def pads_of(mask: Tensor | None, batch: int) -> list[int]:
    """Leading hidden columns of each row of a `[B, L]` mask; ModelError (unsupported) for any other
    padding.
    """
    if mask is None:
        return [0] * batch
    shown = mask.bool()
    pads = (~shown).sum(1)
    if not torch.equal(shown, torch.arange(mask.shape[1], device=mask.device) >= pads[:, None]):
        raise ModelError(
            "the attention mask hides tokens after the first shown one",
            code="unsupported",
            hint="pad on the left: tokenizer.padding_side = 'left'",
        )
    return [int(pad) for pad in pads]
