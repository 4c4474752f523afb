"""The last step of every run: check every quote, count what was read, and state what is missing.

It makes no model call, so it also serves a run that was stopped: with whatever evidence there is, at any
moment, it gives a valid Answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from agentctx.memory.citations import Verifier
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Answer, Chunk, Citation, Coverage, Span, Status
from agentctx.workflows.call import CUT_OFF
from agentctx.workflows.grounding import supported_part
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State

ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)
NO_ANSWER = "The sources that were read do not answer this."


@dataclass(frozen=True, slots=True)
class Covered:
    """What became of each chunk, by its index. A chunk in neither set was not read."""

    chunks: Sequence[Chunk]
    read: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()
    scored: frozenset[int] = frozenset()
    not_forwarded: int = 0


async def conclude(run: RunContext, state: State, covered: Covered, strategy: str) -> dict[str, Any]:
    """The Answer as JSON, every citation verified against the source text."""
    draft = run.cache.get(state["draft"]) if state.get("draft") else None
    # In a thread, because the first quote that is not exact has a whole document normalised.
    chosen, claimed = await asyncio.to_thread(_verified, run.scope, state.get("spans", []), draft or {})
    citations = _unique([*chosen, *(citation for cited in claimed for citation in cited)])
    for citation in citations:
        run.trace.emit("verdict", source=citation.source, verdict=citation.verdict)
    supported = [c for c in citations if c.verdict == "supported"]
    text, uncited = _text(run, draft, citations, claimed)
    failures = state.get("failures", {})
    for failure in failures.values():
        run.warn(f"failed_{failure['kind']}", failure["message"])
    wound = run.stopped_because
    cut_off = any(warning.code == CUT_OFF for warning in run.warnings)
    status = _status(bool(wound or failures or cut_off), bool(supported or (text and text != NO_ANSWER)))
    answer = Answer(
        text=text,
        citations=tuple(citations),
        coverage=coverage(covered),
        strategy=strategy,
        model=run.scope.profile.name,
        usage=run.usage(),
        plan=run.plan,
        run_id=run.run_id,
        status=status,
        warnings=tuple(run.warnings),
        value=(draft or {}).get("value"),
        uncited=uncited,
        stopped_because=wound,
    )
    run.trace.emit("answer", status=status, citations=len(citations), supported=len(supported))
    result: dict[str, Any] = ANSWER.dump_python(answer, mode="json")
    return result


def coverage(covered: Covered) -> Coverage:
    """Tokens and spans: read + unread + failed is the whole input, exactly."""
    count = [chunk.tokens for chunk in covered.chunks]
    unread = [i for i in range(len(count)) if i not in covered.read and i not in covered.failed]
    return Coverage(
        total=sum(count),
        read=sum(count[i] for i in covered.read),
        scored=sum(count[i] for i in covered.scored),
        unread=_joined(covered.chunks[i].span for i in unread),
        failed=_joined(covered.chunks[i].span for i in sorted(covered.failed)),
        not_forwarded=covered.not_forwarded,
    )


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Neighbouring spans as one."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.document_id == span.document_id and last.end == span.start:
            joined[-1] = Span(span.document_id, last.start, span.end)
        else:
            joined.append(span)
    return tuple(joined)


def _verified(
    scope: Scope, spans: Sequence[Sequence[Any]], draft: dict[str, Any]
) -> tuple[list[Citation], list[list[Citation]]]:
    """The citations of the spans, and of each claim of the draft."""
    verifier = scope.keep("verifier", lambda: Verifier(list(scope.documents.values())))
    return _from_spans(scope, verifier, spans), _from_claims(scope, verifier, draft)


def _from_spans(
    scope: Scope, verifier: Verifier, spans: Sequence[Sequence[Any]], claim: str = ""
) -> list[Citation]:
    """Citations of spans that code chose: the quote is cut from the source, then verified all the same."""
    citations = []
    for document_id, start, end, *_ in spans:
        quote = scope.documents[document_id].text[start:end]
        citations.append(verifier.verify(quote, document_id, claim, near=start))
    return citations


def _claims(draft: dict[str, Any]) -> list[dict[str, Any]]:
    return [*draft.get("claims", []), *draft.get("points", [])]


def _from_claims(scope: Scope, verifier: Verifier, draft: dict[str, Any]) -> list[list[Citation]]:
    """Per claim, the citations of the quotes that a model copied for it, or of the spans that code chose.

    A quote is looked for first where its writer was shown it: other texts may hold the same words.
    """
    shown = [Span(*place) for place in draft.get("shown", [])]
    return [
        [
            *(verifier.verify(quote, claim=claim["text"], shown=shown) for quote in claim["quotes"]),
            *_from_spans(scope, verifier, claim.get("spans", []), claim["text"]),
        ]
        for claim in _claims(draft)
    ]


def _place(citation: Citation) -> Span | tuple[str, str]:
    """What makes two citations the same: the place, or the words that were not found."""
    return citation.span or (citation.verdict, citation.quote)


def _unique(citations: Sequence[Citation]) -> list[Citation]:
    """Each place once, the claims' order kept."""
    first: dict[Span | tuple[str, str], Citation] = {}
    for citation in citations:
        first.setdefault(_place(citation), citation)
    return list(first.values())


def _text(
    run: RunContext,
    draft: dict[str, Any] | None,
    citations: Sequence[Citation],
    claimed: Sequence[Sequence[Citation]],
) -> tuple[str, int]:
    """The text to show and how many of its statements no supported citation carries."""
    supported = [citation for citation in citations if citation.verdict == "supported"]
    if draft is None or draft.get("no_information"):
        return (_quoted(citations, supported[0]) if supported else NO_ANSWER), 0
    if "claims" in draft or "points" in draft:
        return _claimed(draft, citations, claimed)
    return _verbatim_first(run, str(draft["text"]), citations, supported)


def _verbatim_first(
    run: RunContext, text: str, citations: Sequence[Citation], supported: Sequence[Citation]
) -> tuple[str, int]:
    """The source's own words, then the model's, and of those only what the shown words say too."""
    if not supported:
        return text or NO_ANSWER, len(sentences(text))
    shown = [_quoted(citations, citation) for citation in supported]
    question = run.scope.task.question
    parts = [supported_part(text, citation.quote, question) for citation in supported]
    worded = max(parts, key=len)
    # The words of it stand in the quote; that they belong together like this, no code has checked.
    return (f"{shown[0]}\n\nIn the model's words: {worded}" if worded else shown[0]), 0


def _claimed(
    draft: dict[str, Any], citations: Sequence[Citation], claimed: Sequence[Sequence[Citation]]
) -> tuple[str, int]:
    """A model's text with the numbers of its supported citations; points become a list, part by part."""
    uncited = 0
    lines: list[str] = []
    part = ""
    for claim, cited in zip(_claims(draft), claimed, strict=True):
        places = [citation for citation in cited if citation.verdict == "supported"]
        uncited += not places
        if claim.get("part", "") != part:
            part = claim["part"]
            lines.append(f"\n{part}" if lines else part)
        lines.append(f"- {' '.join(claim['text'].split())}{_marks(citations, places)}")
    if draft.get("text"):
        places = [citation for citation in citations if citation.verdict == "supported"]
        return str(draft["text"]) + _marks(citations, places), uncited or int(not lines)
    return ("\n".join(lines) if lines else NO_ANSWER), uncited


def _quoted(citations: Sequence[Citation], citation: Citation) -> str:
    return " ".join(citation.quote.split()) + _marks(citations, [citation])


def _marks(citations: Sequence[Citation], places: Sequence[Citation]) -> str:
    """[1][3]: positions in the answer's list of citations."""
    numbers = {_place(citation): number for number, citation in enumerate(citations, 1)}
    marks = "".join(f"[{number}]" for number in dict.fromkeys(numbers[_place(place)] for place in places))
    return f" {marks}" if marks else ""


def _status(ended_early: bool, found: bool) -> Status:
    if ended_early:
        return "partial"
    return "complete" if found else "unanswerable"
