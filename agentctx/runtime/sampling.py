"""Choosing the next token, and the loop that does it: pulled by its consumer, so that nobody waits for
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.runtime.context import Context


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

    def chance(self, device: torch.device | str) -> torch.Generator:
        """A generator for one answer, which nothing else draws from."""
        chance = torch.Generator(device)
        if self.seed is None:
            chance.seed()
        else:
            chance.manual_seed(self.seed)
        return chance


def generate(
    context: Context,
    hidden: Tensor | None,
    *,
    most: int,
    ends: frozenset[int],
    sampling: Sampling,
    cancelled: threading.Event,
) -> Iterator[int]:
    """Yield up to `most` token ids, an end token included, and append them to `context`.

    `hidden [H]` is the hidden state of the context's last token, None if feeding it was cancelled. Ends early
    when `cancelled` is set. The last token yielded is not fed.
    """
    chance = sampling.chance("cpu" if hidden is None else hidden.device)
    state = hidden
    for count in range(most):
        if state is None or cancelled.is_set():
            return
        token = choose(context.engine.logits(state, spoken=True), sampling, chance)
        yield token
        if token in ends or count + 1 == most:
            return
        state = context.feed([token], cancelled=cancelled, spoken=True)


def choose(logits: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """The next token by its logits `[V]`, float32."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of all likelier tokens
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < sampling.top_p))
    return int(torch.multinomial(probabilities, 1, generator=chance))
