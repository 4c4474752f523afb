"""Passages and questions as vectors: the mean keys of a few layers, before any rotation.

The mean key of a block stands for it, as in InfLLM (Xiao et al., arXiv 2402.04617) and others. A question is
compared by its own mean keys, not its queries: no model was trained to aim one query at a mean of keys, and
of 160 passages of Natural Questions the right one was among the first 20 for 0.86 of the questions by keys,
for 0.75 by queries. Keys share large components that say nothing, so each channel is measured from its mean,
in its deviations, and each head counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.vectors import Floats
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine

DEPTHS = (1 / 6, 7 / 30, 0.3)  # of the layers, chosen on the passages above: the best of their thirds
# What questions have in common is the mean over these.
QUESTIONS = (
    "Who was the first person to do this?",
    "When did it happen?",
    "Where is the place that is meant?",
    "How many are there in all?",
    "What is the name of the company that made it?",
    "Which of the two came first, and why?",
    "How does it work?",
    "What does the contract say about the end of the lease?",
    "Who wrote the song that was in the film?",
    "What is the difference between the two commands?",
    "Why was the decision changed later?",
    "How long does it take, and what does it cost?",
)


def router_layers(engine: Engine) -> tuple[int, ...]:
    """The layers whose keys are compared."""
    layers = engine.body.shape.layers
    return tuple(sorted({min(layers - 1, round(depth * layers)) for depth in DEPTHS}))


def unrotated(engine: Engine, context: Context, first: int, count: int) -> Tensor:
    """Keys of the tokens from `first` on, float32 `[count, router layers, Hkv, D]`, as at position 0.

    Raises ModelError (unsupported) where it is not known how a layer turns its keys.
    """
    rotations = engine.body.rotations()
    with engine.lock, torch.inference_mode():
        past = Past.over(context.table)
        try:
            found = []
            for layer in router_layers(engine):
                rotation = rotations[layer]
                if rotation is None:
                    raise ModelError(
                        "the keys of this model cannot be compared: its rotation is not one that is known",
                        code="unsupported",
                        hint="ask without an index",
                    )
                keys = past.read(layer)[0][:, first : first + count].float()[None]
                at = torch.arange(first, first + count, device=keys.device)
                found.append(rotation.move(keys, at, torch.zeros_like(at))[0].cpu())
        finally:
            past.close()
    return torch.stack(found).permute(2, 0, 1, 3)


def block_means(keys: Tensor) -> Tensor:
    """The mean of every 64 tokens: `[blocks, router layers, Hkv, D]`."""
    starts = range(0, len(keys), PAGE_TOKENS)
    return torch.stack([keys[start : start + PAGE_TOKENS].mean(0) for start in starts])


class Measure:
    """Where vectors are measured from: float32 `[router layers, Hkv, D]` each.

    `centre` and `scale` are the mean and deviation of the keys of passages, `asked` the mean of questions.
    """

    def __init__(self, centre: Tensor, scale: Tensor, asked: Tensor) -> None:
        self.centre, self.scale, self.asked = centre, scale.clamp_min(1e-6), asked

    @classmethod
    def of(cls, passages: Sequence[Tensor], questions: Sequence[Tensor]) -> Measure:
        """From the keys of some passages and of the common questions, as `unrotated` gives them."""
        tokens = torch.cat(list(passages))
        asked = torch.stack([question.mean(0) for question in questions]).mean(0)
        return cls(tokens.mean(0), tokens.std(0, correction=0), asked)

    def passage(self, keys: Tensor) -> Floats:
        """One vector for each block of a passage, float32 `[blocks, size]`."""
        return self._vectors(block_means(keys) - self.centre)

    def question(self, keys: Tensor) -> Floats:
        """The vector of a question, float32 `[size]`; a product with a passage's is their mean cosine."""
        (found,) = self._vectors(keys.mean(0, keepdim=True) - self.asked)
        return np.asarray(found, np.float32)

    def packed(self) -> bytes:
        return torch.stack([self.centre, self.scale, self.asked]).numpy().astype("<f4").tobytes()

    @classmethod
    def unpacked(cls, data: bytes, shape: Sequence[int]) -> Measure:
        """What `packed` gave, for `[router layers, Hkv, D]`."""
        return cls(*torch.from_numpy(np.frombuffer(data, "<f4").copy()).view(3, *shape))

    def _vectors(self, moved: Tensor) -> Floats:
        scaled = torch.nn.functional.normalize(moved / self.scale, dim=-1)
        heads = scaled.shape[1] * scaled.shape[2]
        found: Floats = (scaled.flatten(1) / heads**0.5).numpy()
        return found
