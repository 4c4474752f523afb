"""The object that `--json` prints: one per run, on failure too.

`schema_version` rises when a field goes or changes meaning, not when one is added. The JSON Schema beside it
(`schemas/result.schema.json`) ships with the package; `python -m agentctx.result` prints it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from agentctx.memory.errors import AgentctxError, BudgetExceeded
from agentctx.memory.types import Answer, Citation, Coverage, Notice, Plan
from agentctx.workflows.profile import ModelProfile

if TYPE_CHECKING:
    from agentctx.each import Row

SCHEMA_VERSION: Literal[1] = 1


class Part(BaseModel):
    """Frozen, and closed: a field that nobody declared is a bug."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(Part):
    """Where a quote stands in its source, as a reader would say it."""

    kind: str
    value: int | str


class Quote(Part):
    """A citation. `text[start:end] == quote` for every `supported` one, in code points of the document."""

    id: int
    source: str
    document_id: str | None
    page: int | None
    locator: Place | None
    start: int | None
    end: int | None
    quote: str
    verdict: Literal["supported", "misattributed", "stitched", "not_found"]
    claim: str


class Stretch(Part):
    """A span of a document."""

    document_id: str
    start: int
    end: int


class Note(Part):
    """A warning or the reason why a source was skipped."""

    code: str
    source: str
    message: str


class Bracket(Part):
    """What a sparse attention left out: bounds of the mean share, the highest bound, rows attended again."""

    rows: int
    low: float
    high: float
    worst: float
    fallbacks: int


class Read(Part):
    """What became of the input, in tokens."""

    total: int
    read: int
    scored: int
    unread: list[Stretch]
    failed: list[Stretch]
    not_forwarded: int
    skipped: list[Note]
    attention: Bracket | None = None


class Spent(Part):
    """What the run used."""

    calls: int
    input_tokens: int
    output_tokens: int
    cached: int
    scored: int
    retried: int
    seconds: float
    computed_tokens: int
    reused_tokens: int
    draft_tokens: int
    accepted_tokens: int


class Limit(Part):
    """Calls and tokens."""

    calls: int
    input_tokens: int
    output_tokens: int


class Step(Part):
    """One line of the plan."""

    name: str
    role: str
    cost: Limit
    parallel: int
    seconds: float


class Forecast(Part):
    """The plan: `ceiling` is never passed, `seconds` is an estimate."""

    strategy: str
    params: dict[str, Any]
    stages: list[Step]
    ceiling: Limit
    hold: Limit
    retry_pool: int
    seconds: float
    coverage: float
    assumptions: list[str]
    alternatives: list[str]


class ModelUsed(Part):
    """The model that answered. Of a run that was resumed only the id is known."""

    id: str
    kind: str | None = None
    window: int | None = None
    fingerprint: str | None = None


class Problem(Part):
    """Why a command failed."""

    code: str
    message: str
    hint: str


class Result(Part):
    """`status` is the answer's, or `planned` after a dry run, `paused`, or `failed` with `error`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: str
    source: str | None = None  # of one row of several
    span: Stretch | None = None  # of it that was read
    run_id: str | None = None
    status: Literal["complete", "partial", "unanswerable", "planned", "paused", "failed"]
    answer: str | None = None
    value: Any = None
    citations: list[Quote] = []
    uncited: int = 0
    coverage: Read | None = None
    usage: Spent | None = None
    plan: Forecast | None = None
    strategy: str | None = None
    model: ModelUsed | None = None
    stopped_because: str | None = None
    warnings: list[Note] = []
    error: Problem | None = None


def result(answer: Answer, command: str, profile: ModelProfile | None = None) -> Result:
    """The object of a run that gave an answer, complete or not."""
    return Result(
        command=command,
        run_id=answer.run_id,
        status=answer.status,
        answer=answer.text,
        value=answer.value,
        citations=[_quote(number, citation) for number, citation in enumerate(answer.citations, 1)],
        uncited=answer.uncited,
        coverage=_read(answer.coverage),
        usage=Spent(**asdict(answer.usage)),
        plan=_forecast(answer.plan),
        strategy=answer.strategy,
        model=_model(answer.model, profile),
        stopped_because=answer.stopped_because,
        warnings=[Note(**asdict(notice)) for notice in answer.warnings],
    )


def planned(plan: Plan, command: str, profile: ModelProfile, notices: Iterable[Notice] = ()) -> Result:
    """The object of a dry run, with what was noticed when the sources were opened."""
    return Result(
        command=command,
        status="planned",
        plan=_forecast(plan),
        strategy=plan.strategy,
        model=_model(profile.name, profile),
        warnings=[Note(**asdict(notice)) for notice in notices],
    )


def failure(error: AgentctxError, command: str, profile: ModelProfile | None = None) -> Result:
    """The object of a command that failed; with the partial answer, if a budget ended the run."""
    problem = Problem(code=error.code, message=error.message, hint=error.hint)
    if isinstance(error, BudgetExceeded) and error.partial:
        return result(error.partial, command, profile).model_copy(update={"error": problem})
    return Result(command=command, status="failed", error=problem)


def row(found: Row, command: str, profile: ModelProfile | None = None) -> Result:
    """The object of one answer of several."""
    error = failure(found.error, command, profile) if found.error else None
    made = result(found.answer, command, profile) if found.answer else error
    assert made is not None
    span = Stretch(**asdict(found.span)) if found.span else None
    place = {"source": found.source, "span": span}
    return made.model_copy(update={**place, "error": error and error.error})


def schema() -> str:
    """The JSON Schema of `Result`, as it is kept in `schemas/result.schema.json`."""
    return json.dumps(Result.model_json_schema(mode="serialization"), indent=2, ensure_ascii=False) + "\n"


def _model(name: str, profile: ModelProfile | None) -> ModelUsed:
    if profile is None:
        return ModelUsed(id=name)
    return ModelUsed(id=name, kind=profile.kind, window=profile.context, fingerprint=profile.fingerprint)


def _quote(number: int, citation: Citation) -> Quote:
    span, locator = citation.span, citation.locator
    return Quote(
        id=number,
        source=citation.source,
        document_id=span.document_id if span else None,
        page=citation.page,
        locator=Place(kind=locator.kind, value=locator.value) if locator else None,
        start=span.start if span else None,
        end=span.end if span else None,
        quote=citation.quote,
        verdict=citation.verdict,
        claim=citation.claim,
    )


def _read(coverage: Coverage) -> Read:
    return Read.model_validate(asdict(coverage))


def _forecast(plan: Plan) -> Forecast:
    fields = asdict(plan)
    return Forecast(**{name: fields[name] for name in Forecast.model_fields})


if __name__ == "__main__":
    print(schema(), end="")
