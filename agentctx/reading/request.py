"""What a caller may say about one answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Span
from agentctx.runtime.sampling import Sampling

Place = Span | tuple[int, int]  # of a reading: a Span, or characters of its only document


class Options(TypedDict, total=False):
    """See `Request`, which they are the fields of."""

    max_new_tokens: int
    stop: str | Sequence[str]
    seed: int | None
    temperature: float
    top_p: float
    cancel: threading.Event | None
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """Greedy at temperature 0, else sampled from the nucleus `top_p` by a generator of its own, the same for
    the same `seed`. `cancel` is looked at before every token. `exact`: the ids are those of dense greedy
    decoding, however the model attends; its sparse method only drafts.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    seed: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    cancel: threading.Event | None = None
    exact: bool = False
    sampling: Sampling = field(init=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"an answer of {self.max_new_tokens} tokens cannot be generated")
        if self.exact and self.temperature:
            raise ConfigError("an exact answer is the likeliest one", hint="leave out temperature, or exact")
        object.__setattr__(self, "sampling", Sampling(self.temperature, self.top_p, self.seed))

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def cancelled(self) -> threading.Event:
        """The caller's event, or one that nobody sets."""
        return self.cancel or threading.Event()
