"""Token by token generation, pulled by its consumer: when nobody asks for the next token, nothing runs.

Own loop instead of `generate()`: that one pushes, so streaming and stopping need a thread and a queue that
outlive a consumer who left. The prompt is read in pieces, so that a cancelled call ends within one of them
and two calls take turns; every forward pass holds the lock, nothing else does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import is_out_of_memory, out_of_memory
from agentctx.models.weights import Weights

if TYPE_CHECKING:
    import torch

PIECE = 512  # prompt tokens per forward pass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the nucleus `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"a temperature of {self.temperature} is below 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"a top_p of {self.top_p} is not within (0, 1]")


def generate(
    weights: Weights, prompt: Sequence[int], *, most: int, sampling: Sampling, cancelled: threading.Event
) -> Iterator[int]:
    """Yield up to `most` token ids, an end token included; end early when `cancelled` is set."""
    import torch
    from transformers import DynamicCache

    chance = torch.Generator(weights.model.device)
    if sampling.seed is None:
        chance.seed()
    else:
        chance.manual_seed(sampling.seed)
    cache = DynamicCache(config=weights.model.config)
    pending = list(prompt)
    for _ in range(most):
        logits = None
        for start in range(0, len(pending), PIECE):
            if cancelled.is_set():
                return
            logits = _forward(weights, pending[start : start + PIECE], cache)
        if logits is None:
            return
        token = _choose(logits, sampling, chance)
        yield token
        if token in weights.ends:
            return
        pending = [token]


def _forward(weights: Weights, ids: list[int], cache: Any) -> torch.Tensor:
    """Feed `ids` after what `cache` holds; returns the logits of the next token, [vocabulary]."""
    import torch

    try:
        with weights.lock, torch.inference_mode():
            batch = torch.tensor([ids], device=weights.model.device)
            output: Any = weights.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits: torch.Tensor = output.logits[0, -1].float()
            return logits
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(weights.name) from error
        raise


def _choose(logits: torch.Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all likelier tokens
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < sampling.top_p))
    return int(torch.multinomial(probabilities, 1, generator=chance))
