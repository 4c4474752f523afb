"""A small Llama of random weights, in float32, with any number of query heads to a KV head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method

LAYERS, HEADS, SIZE = 2, 2, 16
QUESTION = [5, 6, 7, 8]


@cache
def body(group: int) -> LlamaDecoder:
    torch.manual_seed(group)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HEADS * group * SIZE,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * group,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        initializer_range=0.3,  # large, so that a wrong past changes the answer
    )
    return LlamaDecoder(config.to_dict(), LlamaForCausalLM(config).state_dict(), torch.float32)


def engine(group: int = 3, attention: str = "dense", **options: Any) -> Engine:
    return Engine(body(group), fingerprint="tiny", memory_bytes=32 << 20, method=method(attention), **options)


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def hidden(context: Context, ids: Sequence[int]) -> Tensor:
    found = context.feed(ids)
    assert found is not None
    return found


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
