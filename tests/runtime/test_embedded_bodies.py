"""The embedded model answers alike in transformers, there with our attention, and in our own decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentctx.models.catalog import ensure
from agentctx.models.table import SMOLLM2
from agentctx.paths import Paths
from agentctx.runtime.body import Body
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.hf.probe import probe
from agentctx.runtime.llama import LlamaDecoder

README = Path(__file__).parents[2] / "README.md"
LENGTH = 400


def _last(body: Body, ids: list[int]) -> Tensor:
    """Logits after reading all but the last token in the engine's pieces."""
    engine = Engine(body, fingerprint="embedded", memory_bytes=1 << 28)
    context = engine.read(ids[:-1])
    hidden = context.fork().feed(ids[-1:])
    assert hidden is not None
    return engine.logits(hidden)


@pytest.mark.model
@pytest.mark.slow
def test_three_ways_through_one_model(embedded: Paths) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = ensure(SMOLLM2, embedded)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(README.read_text(encoding="utf-8")).input_ids[:LENGTH]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        stock = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    body = HFBody(model)
    for found in (_last(body, ids), _last(LlamaDecoder.load(folder, torch.float32), ids)):
        torch.testing.assert_close(found, stock, atol=2e-4, rtol=0)
    rotations = probe(model, body.window)
    assert all(found is not None and found.rotary_dim == 64 for found in rotations)
