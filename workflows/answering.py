"""Answer from pieces of text that fit one call: the step in which every search ends.

A model that writes returns claims with copied quotes. A model that only reads is not trusted with that: the
Reader picks the verbatim sentence, the model words a short answer, and code keeps the wording only if the
sentence supports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel

from agentctx.memory.citations import Verifier
from agentctx.memory.types import Failure, Plan, Span
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.grounding import supports
from agentctx.workflows.meter import MeteredReader, Refused
from agentctx.workflows.notes import Note, keep_record, places_of
from agentctx.workflows.pick import pick, pick_cost
from agentctx.workflows.roles import ANSWER, SHORT_ANSWER, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text to answer from: the one at `span`, or words of the sources that stand at `quoted`."""

    label: str
    text: str
    span: Span | None = None
    quoted: tuple[Span, ...] = ()


def answer_role(scope: Scope) -> Role:
    """How this model is asked for an answer."""
    return scope.role(ANSWER if scope.profile.writes else SHORT_ANSWER)


def whole_pieces(scope: Scope) -> list[Piece]:
    """Every document as one piece."""
    return [Piece(d.source, d.text, Span(d.id, 0, len(d.text))) for d in scope.documents.values()]


def answer_input(scope: Scope, pieces: Sequence[Piece], role: Role | None = None) -> tuple[int, int]:
    """Tokens of the finished prompt over these pieces, and the most it may return."""
    role = role or answer_role(scope)
    messages = role.render(scope.task.question, _shown(pieces), scope.tag)
    return scope.prompt_tokens(messages), role.max_output


def pieces_of(scope: Scope, notes: Sequence[Note]) -> list[Piece]:
    """The notes' quotes as pieces to answer from, one a note, as many as the window surely takes.

    Each is counted with its delimiters, and raised, as tokens of joined texts may exceed the sum of theirs.
    """
    pieces: list[Piece] = []
    bare, output = answer_input(scope, [])
    frames: dict[str, int] = {}
    room = scope.profile.window - output - bare
    for note in notes:
        label = scope.label(note.spans[0])
        text = "\n".join(scope.text(span) for span in note.spans)
        if label not in frames:
            frames[label] = answer_input(scope, [Piece(label, "")])[0] - bare
        room -= (scope.text_tokens(text) + frames[label]) * 5 // 4
        if room < 0 and pieces:
            break
        pieces.append(Piece(label, text, quoted=note.spans))
    return pieces


def direct_plan(scope: Scope, name: str = "direct", role: Role | None = None) -> Plan:
    """One call over everything."""
    pieces = whole_pieces(scope)
    role = role or answer_role(scope)
    tokens, output = answer_input(scope, pieces, role)
    stages = [cost.stage("answer", role.name, [tokens], output, scope.profile)]
    if scope.reader and not scope.profile.writes:
        looked = pick_cost(scope.task.question, [piece.text for piece in pieces], reader=scope.reader)
        stages.append(cost.scoring("pick", looked, scope.profile))
    return cost.make_plan(
        name,
        {},
        stages,
        largest_input=tokens,
        largest_output=output,
        hold=stages[0].cost,
        coverage=1.0,
        supersteps=8,
    )


async def answer_pieces(
    run: RunContext,
    pieces: Sequence[Piece],
    role: Role | None = None,
    model: BaseChatModel | None = None,
) -> dict[str, Any]:
    """The state update of an answer: a draft, the spans that code chose, and failures.

    `model` answers in the place of the run's, as in `ask`.
    """
    role = role or answer_role(run.scope)
    question, shown = run.scope.task.question, _shown(pieces)
    result = await ask(run, role, question, shown, finishing=True, stream=True, model=model)
    update: dict[str, Any] = {}
    if isinstance(result, Failure):
        update["failures"] = {"answer": asdict(result)}
    elif "claims" in result.data:
        update["draft"] = keep_record(run, "answer", {**result.data, "shown": _places(pieces)})
    else:
        update["draft"] = result.id
    if not run.scope.profile.writes:
        update["spans"] = await _spans(
            run, pieces, "" if isinstance(result, Failure) else result.data["text"]
        )
    return update


async def _spans(run: RunContext, pieces: Sequence[Piece], answer: str) -> list[list[Any]]:
    """The verbatim sentences to show, best first."""
    placed = [piece for piece in pieces if piece.span]
    question, texts = run.scope.task.question, [piece.text for piece in placed]
    try:
        reader = MeteredReader(run, finishing=True) if run.scope.reader else None
        picked = await pick(question, texts, reader=reader, answer=answer)
    except Refused:
        picked = await pick(question, texts, reader=None, answer=answer)
    spans = []
    for chosen in picked.picks:
        span = placed[chosen.passage].span
        assert span is not None
        spans.append(
            [span.document_id, span.start + chosen.start, span.start + chosen.end, chosen.score, "score"]
        )
    return spans


def _places(pieces: Sequence[Piece]) -> list[list[Any]]:
    """Where the words stand that the pieces show, each place once."""
    spans = (span for piece in pieces for span in ((piece.span,) if piece.span else piece.quoted))
    return places_of(dict.fromkeys(spans))


def is_grounded(run: RunContext, update: dict[str, Any]) -> bool:
    """True if there is an answer and code finds a supported quote for each of its claims."""
    data = run.cache.get(update["draft"]) if "draft" in update else None
    if not data or data.get("no_information"):
        return False
    if "claims" not in data:
        return any(
            supports(data["text"], run.scope.text(Span(*span[:3])), run.scope.task.question)
            for span in update.get("spans", [])
        )
    verifier = run.scope.keep("verifier", lambda: Verifier(list(run.scope.documents.values())))
    return bool(data["claims"]) and all(
        any(verifier.verify(quote).verdict == "supported" for quote in claim["quotes"])
        for claim in data["claims"]
    )


def _shown(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    return [(piece.label, piece.text) for piece in pieces]
