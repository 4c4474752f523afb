"""A small model of random weights in float32 that reads bytes, for tests of readings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentctx.memory.kv.store import BlockStore
from agentctx.models.tokenizer import Tokenizer
from agentctx.models.weights import Weights
from agentctx.reading.engine import Engine
from agentctx.runtime.engine import Engine as Runtime
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method

SECRET = b"s" * 32
TEXT = "The court of Łódź ruled on 3 May 1984; nobody appealed. 東京 🙂 " * 6
NEVER: frozenset[int] = frozenset()


@cache
def stock() -> Any:
    """transformers' own; its weights are large, so that another past gives another answer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@cache
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def engine(
    folder: Path,
    *,
    kv: Path | None = None,
    attention: str = "dense",
    ends: frozenset[int] = NEVER,
    pages: int = 400,
    chunk: int = 512,
) -> Engine:
    """`folder` has the tokenizer."""
    body = LlamaDecoder(stock().config.to_dict(), stock().state_dict(), torch.float32)
    store = BlockStore(kv, "tiny", budget=1 << 30) if kv else None
    room = pages * body.shape.page_bytes
    runtime = Runtime(
        body, fingerprint="tiny", memory_bytes=room, method=method(attention), store=store, chunk=chunk
    )
    return Engine(Weights(runtime, tokenizer(folder), "tiny", ends), secret=SECRET)
