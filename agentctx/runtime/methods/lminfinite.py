"""LM-Infinite: a mask in the shape of a Lambda, and no distance above the one of training.

Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", arXiv
2308.16137. The window keeps its true positions; the first tokens are all seen from a distance of exactly the
window. The paper's optional top-k tokens of the middle are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.moving import moved
from agentctx.runtime.methods.sparse import positions
from agentctx.runtime.methods.streaming import Streaming, first_tokens, given_attention


@dataclass(frozen=True)
class Lambda(Streaming):
    """`sinks` first tokens and a `window` of the last, which should be what the model was trained for."""

    name: ClassVar[str] = "lambda"

    sinks: int = 10
    window: int = 4096

    def sink_attention(self, q: Tensor, kv: LayerKV) -> Attention:
        k, v = first_tokens(kv, self.sinks)
        stand = torch.arange(self.sinks, dtype=torch.int32, device=q.device)
        k = moved(k, stand, 0, kv)
        return given_attention(moved(q, positions(q, kv)[0], self.window, kv), k, v, kv)
