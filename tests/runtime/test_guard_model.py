"""The bracket of dropped attention on the keys of the embedded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.models.load import Model
from agentctx.models.local import LocalChat
from agentctx.runtime.guard import bracket
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.quest import Quest

pytestmark = pytest.mark.model


@dataclass(frozen=True)
class Watched(Quest):
    """Quest that keeps the bracket and the exact dropped share of every layer."""

    seen: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        chosen, found, exact = self.choose(q, kv), super().part(q, kv), kv.exact(q)
        low, high = bracket(q, kv, chosen, found.lse)
        share = -torch.expm1(found.lse - exact.lse)
        self.seen.append((kv.index, low, share, high))
        return exact


def test_the_bracket_holds_on_real_keys(embedded_model: Model) -> None:
    assert isinstance(embedded_model.chat, LocalChat)
    weights = embedded_model.chat.weights
    ids = weights.tokenizer.encode(Path(__file__).with_name("test_methods.py").read_text())[:1016]
    some = Watched(budget=448, dense_below=448, dense_layers=0)
    context = weights.engine.read(ids[:1000])
    context.state.method = some
    context.feed(ids[1000:])
    context.close()
    assert len({index for index, *_ in some.seen}) == weights.engine.body.shape.layers
    for _, low, share, high in some.seen:
        assert bool((low <= share + 0.01).all()) and bool((share <= high + 0.01).all())  # keys in bfloat16
