"""Notes: what reads found, each tied to the words that carry it, ordered, merged and bounded by code.

A model that writes copies its quotes and every quote is verified before the note is used. A model that only
reads gives one sentence; code finds the sentence of the chunk that supports it, or drops the note.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentctx.memory.citations import Verifier
from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Span
from agentctx.workflows.answering import Piece, answer_input
from agentctx.workflows.cache import call_key
from agentctx.workflows.call import ask
from agentctx.workflows.cut import Cut
from agentctx.workflows.grounding import content_words, supports
from agentctx.workflows.roles import MERGE, SUMMARISE
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record

MAX_POINTS = 24  # of a summary that no model merged


@dataclass(frozen=True, slots=True)
class Note:
    """One statement of one read, and the places in the sources that carry it."""

    read: int
    text: str
    spans: tuple[Span, ...]
    confidence: float


def notes_of(run: RunContext, made: Cut, reads: Mapping[str, str]) -> list[Note]:
    """The notes of the reads, in reading order; statements without a supported quote are left out."""
    records = run.cache.get_many(list(reads.values()))
    notes: list[Note] = []
    for number in sorted(map(int, reads)):
        data = records[reads[str(number)]]
        spans = [made.chunks[i].span for i in made.reads[number].chunks]
        claims = stated(data)
        if claims is None:
            claims = _claims_of_text(run.scope, data["text"], spans)
        for claim in claims:
            places = verified(run, claim["quotes"], spans)
            if places:
                confidence = data.get("confidence", claim.get("confidence", 0))
                notes.append(Note(number, claim["text"], places, confidence))
    return notes


def stated(data: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The statements of a record with their quotes, whatever it was for; None for a record of plain text."""
    if "items" in data:
        return [{"text": item_text(i["key"], i["value"]), "quotes": i["quotes"]} for i in data["items"]]
    if "label" in data:
        return [{"text": data["label"], "quotes": data["quotes"]}]
    found: list[dict[str, Any]] | None = data.get("facts", data.get("points", data.get("claims")))
    return found


def item_text(key: str, value: str) -> str:
    """An item as a statement."""
    return f"{key}: {value}" if value else key


def best_first(notes: Sequence[Note]) -> list[Note]:
    """Most confident first; equal confidence keeps the reading order."""
    return sorted(notes, key=lambda note: -note.confidence)


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
        pieces.append(Piece(label, text))
    return pieces


def spans_of(notes: Sequence[Note]) -> list[list[Any]]:
    """The notes' places as the state keeps them."""
    return [[s.document_id, s.start, s.end, note.confidence, "score"] for note in notes for s in note.spans]


async def merge_level(run: RunContext, group: Sequence[str], fan_in: int) -> list[str]:
    """Merge neighbours, at most `fan_in` at a time; a merge that fails is replaced by joining, by code."""
    if len(group) < 2:
        return list(group)
    size = -(-len(group) // -(-len(group) // fan_in))
    batches = [list(group[at : at + size]) for at in range(0, len(group), size)]
    return list(await asyncio.gather(*(_merge(run, batch) for batch in batches)))


async def _merge(run: RunContext, batch: Sequence[str]) -> str:
    if len(batch) == 1:
        return batch[0]
    records = run.cache.get_many(list(batch))
    pieces = [
        (f"notes {n}", _fitted(run.scope, stated(records[key]) or ())) for n, key in enumerate(batch, 1)
    ]
    result = await ask(run, run.scope.role(MERGE), run.scope.task.question, pieces, finishing=True)
    if isinstance(result, Record):
        return result.id
    run.warn("merge_failed", f"a merge failed ({result.message}); its notes were joined unmerged")
    points = [point for key in batch for point in stated(records[key]) or ()]
    return keep_record(run, "joined", {"points": points[:MAX_POINTS], "no_information": not points})


def _fitted(scope: Scope, points: Sequence[Mapping[str, Any]]) -> str:
    """The points as text of at most one record's tokens; the last ones leave whole, never half a quote."""
    lines = [point["text"] + "".join(f'\n  "{quote}"' for quote in point["quotes"]) for point in points]
    while len(lines) > 1 and scope.text_tokens("\n".join(lines)) > scope.role(SUMMARISE).max_output:
        lines.pop()
    return "\n".join(lines)


def outline(
    run: RunContext, made: Cut, groups: Sequence[Sequence[str]], reads: Mapping[str, str]
) -> tuple[str, int]:
    """The draft of a summary: the parts' points in order, under the parts' names.

    Returns its record id, and how many notes had to be left out.
    """
    points: list[dict[str, Any]] = []
    left_out = 0
    if run.scope.profile.writes:
        for name, group in zip(made.parts, groups, strict=True):
            for data in run.cache.get_many(list(group)).values():
                points += [{**point, "part": name} for point in data["points"]]
    else:
        notes = notes_of(run, made, reads)
        left_out = max(0, len(notes) - MAX_POINTS)
        for note in _central(notes):
            part = made.parts[made.reads[note.read].part]
            quotes = [run.scope.text(span) for span in note.spans]
            points.append({"text": note.text, "quotes": quotes, "part": part})
    return keep_record(run, "outline", {"points": points, "no_information": not points}), left_out


def no_information(run: RunContext) -> str:
    """The record of having found nothing."""
    return keep_record(run, "nothing", {"text": "", "claims": [], "no_information": True})


def keep_record(run: RunContext, role: str, data: dict[str, Any]) -> str:
    """Store what code made like what a model made, so that state holds its id only."""
    key = call_key(role=role, data=data)
    run.cache.put(key, data)
    return key


def verified(run: RunContext, quotes: Iterable[str], spans: Sequence[Span]) -> tuple[Span, ...]:
    """Where those quotes stand that are in the documents that were read."""
    documents = run.scope.documents
    verifier = run.scope.keep("verifier", lambda: Verifier(list(documents.values())))
    kept = []
    for quote in quotes:
        for document_id in dict.fromkeys(span.document_id for span in spans):
            citation = verifier.verify(quote, document_id)
            if citation.verdict == "supported" and citation.span:
                kept.append(citation.span)
                break
    return tuple(kept)


def _claims_of_text(scope: Scope, text: str, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """A plain sentence as a claim, with the sentence of the chunks that supports it best, if one does."""
    found = []
    for span in spans:
        source = scope.documents[span.document_id].text
        found += [source[start:end].strip() for start, end in sentences(source, span.start, span.end)]
    found = [sentence for sentence in found if sentence]
    if not text or not found:
        return []
    question = scope.task.question
    scores = Lexical(found).scores(text)
    best = max(range(len(found)), key=scores.__getitem__)
    if supports(text, found[best], question):
        overlap = len(content_words(question) & content_words(found[best]))
        return [{"text": text, "quotes": [found[best]], "confidence": overlap}]
    return (
        [{"text": found[best], "quotes": [found[best]], "confidence": 0}]
        if scope.task.kind != "search"
        else []
    )


def _central(notes: Sequence[Note]) -> list[Note]:
    """At most MAX_POINTS notes, those whose words the others share most, in reading order."""
    if len(notes) <= MAX_POINTS:
        return list(notes)
    words = [content_words(note.text) for note in notes]
    shared: dict[str, int] = {}
    for mine in words:
        for word in mine:
            shared[word] = shared.get(word, 0) + 1
    weight = [sum(shared[w] for w in mine) / (len(mine) + 4) for mine in words]
    best = sorted(range(len(notes)), key=lambda i: -weight[i])[:MAX_POINTS]
    return [notes[i] for i in sorted(best)]
