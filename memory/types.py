"""The nouns that every floor shares. Values are frozen; offsets count code points of `Document.text`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["supported", "misattributed", "stitched", "not_found"]
Status = Literal["complete", "partial", "unanswerable"]
FailureKind = Literal[
    "timeout", "rate_limit", "overflow", "parse", "refusal", "backend", "budget", "cancelled"
]


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a stretch of text stands in its source: page 12, sheet "Costs" row 4, chapter "II"."""

    start: int
    end: int
    kind: str  # page, heading, line, row, record, slide, sheet, paragraph, chapter
    value: int | str


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name it goes by. Equal texts have equal ids."""

    id: str  # sha256 of the text in UTF-8, hexadecimal
    source: str  # path relative to what was opened, "<stdin>", or a name the caller gave
    text: str = field(repr=False)
    media_type: str = "text/plain"
    locators: tuple[Locator, ...] = field(default=(), repr=False)  # sorted by start

    @classmethod
    def of(
        cls,
        text: str,
        source: str = "<text>",
        *,
        media_type: str = "text/plain",
        locators: tuple[Locator, ...] = (),
    ) -> Document:
        """Make a document of a text, computing its id."""
        return cls(hashlib.sha256(text.encode()).hexdigest(), source, text, media_type, locators)

    @property
    def pages(self) -> tuple[Locator, ...]:
        """The page locators, empty for a text without pages."""
        return tuple(locator for locator in self.locators if locator.kind == "page")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """`text[start:end]` of one document."""

    document_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span and the number of tokens of its own text."""

    span: Span
    tokens: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """A verbatim stretch of a source that bears on the question."""

    span: Span
    quote: str  # always the source's own characters
    note: str = ""
    id: str = ""
    score: float = 0.0
    producer: str = ""  # quote (a model copied it), pick (a model named it), score (a Reader ranked it)
    origin: Literal["document", "model"] = "document"


@dataclass(frozen=True, slots=True)
class Citation:
    """A quote as it is shown, with the verdict of the check against the source."""

    source: str
    span: Span | None  # None when the quote was not found anywhere
    quote: str
    verdict: Verdict
    page: int | None = None
    locator: Locator | None = None
    claim: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a user should know: a skipped source, a guessed encoding, a failed leaf."""

    code: str
    message: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """Calls and tokens, planned or spent."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.calls - other.calls,
            self.input_tokens - other.input_tokens,
            self.output_tokens - other.output_tokens,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.calls * times, self.input_tokens * times, self.output_tokens * times)

    def within(self, limit: Cost) -> bool:
        """True if no dimension is above `limit`'s."""
        return (
            self.calls <= limit.calls
            and self.input_tokens <= limit.input_tokens
            and self.output_tokens <= limit.output_tokens
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """What a caller allows. None means no limit in that dimension; `depth` counts nested strategies."""

    calls: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run spent. `input_tokens` are those of all prompts and those the Reader computed.

    `reused_tokens` of prompts and scored texts had their keys and values already; `computed_tokens` had not,
    as far as the model tells.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    cached: int = 0  # calls answered by the leaf cache
    scored: int = 0  # input tokens read by the Reader to score, not by a chat call
    retried: int = 0  # calls that were second or later attempts
    computed_tokens: int = 0
    reused_tokens: int = 0
    draft_tokens: int = 0  # of exact answers: guessed by sparse attention,
    accepted_tokens: int = 0  # and those of them that dense attention agreed with


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of a plan."""

    name: str
    role: str
    cost: Cost
    parallel: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will cost at most. `ceiling` is never passed; `seconds` is an estimate."""

    strategy: str
    params: dict[str, Any]
    stages: tuple[Stage, ...]
    ceiling: Cost
    seconds: float
    retry_pool: int  # extra attempts, inside the ceiling
    hold: Cost  # kept back for finishing, inside the ceiling
    coverage: float  # share of the input's tokens that will be read verbatim
    supersteps: int  # LangGraph's recursion limit
    assumptions: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A model call that gave nothing. It is data, so that one failed leaf does not end a run."""

    kind: FailureKind
    message: str
    span: Span | None = None
    retryable: bool = False
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The share of attention that a sparse method left out, as a guard brackets it: over `rows` of heads and
    tokens the mean is between `low` and `high`, and no row's can exceed `worst`; `fallbacks` rows were
    attended densely after all.
    """

    rows: int
    low: float
    high: float
    worst: float
    fallbacks: int

    def __add__(self, other: LeftOut) -> LeftOut:
        rows = self.rows + other.rows
        low, high = (
            (one * self.rows + two * other.rows) / rows
            for one, two in ((self.low, other.low), (self.high, other.high))
        )
        worst = max(self.worst, other.worst)
        return LeftOut(rows, low, high, worst, self.fallbacks + other.fallbacks)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of the input, in tokens: read + tokens of unread + tokens of failed = total."""

    total: int = 0
    read: int = 0  # sent verbatim in a call that succeeded
    scored: int = 0  # ranked by the Reader, whether read or not
    unread: tuple[Span, ...] = ()
    failed: tuple[Span, ...] = ()
    not_forwarded: int = 0  # evidence items that did not fit the next step
    skipped: tuple[Notice, ...] = ()  # sources that could not be read at all
    attention: LeftOut | None = None  # of a sparse method with a guard, over the calls that were not cached


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run returns. `text` is grounded in `citations`; `coverage` says what was not looked at."""

    text: str
    citations: tuple[Citation, ...]
    coverage: Coverage
    strategy: str
    model: str
    usage: Usage
    plan: Plan
    run_id: str
    status: Status
    warnings: tuple[Notice, ...] = ()
    value: Any = None
    uncited: int = 0  # sentences of the text that no supported citation backs
    stopped_because: str | None = None
