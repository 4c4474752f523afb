"""Reading a long text never makes a tensor that grows with its square, nor one for each key of each query."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.body import Body
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.hf.cache import PagedCache
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.state import KVState

LENGTH = 2048
WIDE = 384  # elements for each token: the inner layers of two experts


class Largest(TorchDispatchMode):
    """The most elements of a storage that any operator returned, views of older ones aside."""

    def __init__(self, *older: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.shape: tuple[int, ...] = ()
        self.older = {tensor.untyped_storage().data_ptr() for tensor in older}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.older:
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                if size > self.elements:
                    self.elements, self.shape = size, tuple(tensor.shape)
        return found


def _read(body: Body, pieces: int) -> Largest:
    """Hidden states of `LENGTH` tokens, in so many steps."""
    pool = PagePool(body.shape, budget=1 << 24)
    state = KVState(pool, [BlockTable(pool)], Dense(), [0])
    layers = pool.layers
    with torch.inference_mode(), Largest(*(x for pages in layers for x in (pages.k, pages.v))) as largest:
        for ids in torch.zeros(1, LENGTH, dtype=torch.long).chunk(pieces, 1):
            body.forward(ids, state)
    return largest


def _ours(folder: Path) -> Body:
    tiny.tiny("Llama").save_pretrained(folder)
    return LlamaDecoder.load(folder, torch.float32)


BODIES: dict[str, Callable[[Path], Body]] = {
    "ours": _ours,
    "llama": lambda _: HFBody(tiny.FAMILIES["llama"]()),
    "windows and caps": lambda _: HFBody(tiny.FAMILIES["gemma2"]()),
    "windows and sinks": lambda _: HFBody(tiny.FAMILIES["gpt-oss"]()),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("pieces", [1, 4])
def test_nothing_has_the_extent_of_queries_times_keys(name: str, pieces: int, tmp_path: Path) -> None:
    largest = _read(BODIES[name](tmp_path), pieces)
    assert 0 < largest.elements <= LENGTH // pieces * WIDE, largest.shape


def test_padded_batches_neither() -> None:
    model = HFBody(tiny.FAMILIES["mistral-window"]()).model
    cache = PagedCache(PagePool(HFBody(model).shape, budget=1 << 24))
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [700]])).long()
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    own = [x for pages in cache.pool.layers for x in (pages.k, pages.v)]
    with torch.inference_mode(), Largest(*own) as largest:
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert 0 < largest.elements <= 2 * LENGTH * WIDE, largest.shape


def test_the_recorder_sees_the_weights_of_eager_attention() -> None:
    model = tiny.tiny("Llama")
    model.set_attn_implementation("eager")
    with torch.inference_mode(), Largest() as largest:
        model(torch.zeros(1, 512, dtype=torch.long), logits_to_keep=1)
    assert largest.elements >= 4 * 512 * 512
