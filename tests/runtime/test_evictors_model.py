"""Evictors on the embedded model: less is lost than by chance, and as much memory is saved as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentctx.models.load import Model
from agentctx.models.local import LocalChat
from agentctx.runtime.context import Context
from agentctx.runtime.methods.evictor import Evictor, compress
from agentctx.runtime.methods.table import method

pytestmark = pytest.mark.model
EXAMPLES = Path(__file__).parents[2] / "examples"


def predictions(context: Context, ids: list[int]) -> Tensor:
    """Log-probabilities of what follows each of `ids`, `[n, V]`."""
    fork = context.fork()
    found = context.engine.logits(context.engine.step([fork], torch.tensor([ids]))[0])
    fork.close()
    return found.log_softmax(-1)


def test_a_quarter_of_the_keys(embedded_model: Model) -> None:
    assert isinstance(embedded_model.chat, LocalChat)
    weights = embedded_model.chat.weights
    text = (EXAMPLES / "council-minutes.txt").read_text(encoding="utf-8")
    ids = weights.tokenizer.encode(text, special=True)[:960]
    context, rest = weights.engine.read(ids[:896]), ids[896:]
    dense = predictions(context, rest)
    lost = {}
    for name in ("kvzip", "expected", "randomtokens"):
        evictor = method(name)
        assert isinstance(evictor, Evictor)
        used = weights.engine.pool.used_bytes
        part = compress(context, evictor, keep=0.25)
        assert weights.engine.pool.used_bytes - used <= 0.36 * len(context.table.pages) * _page(context)
        found = predictions(part, rest)
        lost[name] = float((dense.exp() * (dense - found)).sum(-1).mean())
        part.close()
    context.close()
    assert lost["kvzip"] < lost["expected"] < lost["randomtokens"]


def _page(context: Context) -> int:
    return context.engine.pool.shape.page_bytes
