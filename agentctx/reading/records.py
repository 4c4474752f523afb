"""What a reading answers with: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentctx.runtime import notes

Finish = Literal["stop", "length", "cancelled", "window"]
Basis = Literal["configured", "calibrated", "table", "assumed"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact numbers of tokens. `prompt_tokens` are `reused_tokens`, whose keys and values were held already,
    and `computed_tokens`. `draft_tokens` were guessed for `exact=True`, `accepted_tokens` of them rightly.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.prompt_tokens == self.reused_tokens + self.computed_tokens, self


@dataclass(frozen=True, slots=True)
class Bracket:
    """Bounds of the share of attention that a sparse method left out, over `rows` rows, heads and layers.

    `low` and `high` are means, `worst` the highest upper bound; `fallbacks` rows were attended densely after
    all. See `runtime.guard` for what the bounds are worth.
    """

    low: float
    high: float
    worst: float
    rows: int
    fallbacks: int

    @classmethod
    def of(cls, seen: notes.Coverage) -> Bracket | None:
        """None where nothing was bracketed: the method is dense, or has no guard, or the text was short."""
        if not seen.rows:
            return None
        return cls(seen.low / seen.rows, seen.high / seen.rows, seen.worst, seen.rows, seen.fallbacks)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the text an answer could draw on, in tokens: it has `total`, `read` were read, and
    `visible` of those were not hidden from this answer.
    """

    total: int
    read: int
    visible: int
    bracket: Bracket | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """`token_ids` are all that were generated, an end token or stop sequence included; `text` is without.

    `finish`: "stop" the model ended or a stop sequence came, "length" `max_new_tokens` are generated,
    "window" the model's window is full, "cancelled".
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    usage: Usage
    coverage: Coverage
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer as it comes: whole characters, and the tokens since the piece before. The last one
    carries the whole reply.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens, prompt and answer together: `trained` by the model's makers, `configured` as the attention
    method stretches them, `reliable` those that the model reads well, and those whose KV fits the memory.

    `method` tells where `reliable` is from: "configured" by the caller, "calibrated" on this model's files,
    the "table" of models, or "assumed" as nobody has measured it.
    """

    trained: int
    configured: int
    reliable: int
    memory_tokens: int
    method: Basis
