"""Attention methods under transformers' own generation: rows padded on the left are the rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import KVShape, PagePool
from agentctx.runtime.hf.attention import NAME, register
from agentctx.runtime.hf.cache import PagedCache
from agentctx.runtime.methods.table import method

SHAPE = KVShape(2, 2, 32, torch.float32)
LENGTHS = (700, 620, 90)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=None,
    )
    loaded: Any = LlamaForCausalLM(config).eval()
    register()
    loaded.set_attn_implementation(NAME)
    return loaded


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, text: str) -> torch.Tensor:
    cache = PagedCache(PagePool(SHAPE, budget=16 << 20), method=method(text))
    found: torch.Tensor = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False
    )
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize(
    "text",
    [
        "quest:budget=448,dense_below=0,dense_layers=0",
        "mean:budget=448,dense_below=0,dense_layers=0",
        "adamas:budget=448,dense_below=0,dense_layers=0",
        "triangle:dense_below=0,local=200",
        "blocktopk:budget=256,dense_below=0,dense_layers=0",
        "flex:budget=192,dense_below=0,dense_layers=0,cell=256,gamma=0.5",
    ],
)
def test_padded_rows_are_the_rows_alone(model: Any, text: str) -> None:
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    together = generated(model, ids * mask, mask.long(), text)
    for row, length in enumerate(LENGTHS):
        alone = generated(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:].long(), text)
        assert torch.equal(together[row], alone[0])


def test_a_method_that_moves_positions_is_refused_without_a_rotation(model: Any) -> None:
    ids = torch.ones(1, 300, dtype=torch.int64)
    with pytest.raises(ModelError, match="rotation of positions"):
        generated(model, ids, torch.ones_like(ids), "streaming:window=100")
