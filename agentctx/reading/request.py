"""What a caller may say about one answer."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Span
from agentctx.runtime.sampling import Sampling

Place = Span | tuple[int, int]  # of a reading: a Span, or characters of its only document


class Options(TypedDict, total=False):
    """How to answer: the fields of `Request` with these names."""

    max_new_tokens: int
    stop: str | Sequence[str]
    seed: int | None
    temperature: float
    top_p: float
    cancel: threading.Event | None
    exact: bool


class Asking(Options, total=False):
    """And from which part of a reading: the fields of `Focus`."""

    pins: Sequence[Place]
    attend_only: Sequence[Place] | None
    drop: Sequence[Place]
    reread: bool
    force: bool


@dataclass(frozen=True, kw_only=True)
class Focus:
    """What of a text an answer sees. Tokens that hold any character of a span count as in it; what stands
    before the text, its first tokens where nothing does, the question and the answer are always seen.

    `attend_only`: only these spans. `drop`: not these. Other tokens keep what they took from dropped ones
    when they were read, unless `reread` computes them anew. `pins`: a method that chooses blocks always takes
    those of these spans. `force`: a question may be another than the one that a reading was made for.
    """

    pins: Sequence[Place] = ()
    attend_only: Sequence[Place] | None = None
    drop: Sequence[Place] = ()
    reread: bool = False
    force: bool = False


def question_hash(question: str) -> str:
    """What a reading that was made for one question remembers of it."""
    return hashlib.sha256(question.strip().encode()).hexdigest()


def split(options: Asking) -> tuple[Focus, Request]:
    """Both, of what a caller gave. Raises TypeError for a name that neither knows."""
    names = Focus.__dataclass_fields__
    focus: Any = {name: value for name, value in options.items() if name in names}
    rest: Any = {name: value for name, value in options.items() if name not in names}
    return Focus(**focus), Request(**rest)


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
