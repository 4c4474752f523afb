"""Notes: what reads found, each tied to the words that carry it, ordered, merged and bounded by code.

A model that writes copies its quotes and every quote is verified before the note is used. A model that only
reads gives one sentence; code finds the sentence of the chunk that supports it, or drops the note.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from agentctx.memory.citations import Verifier
from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Span
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


def places_of(spans: Iterable[Span]) -> list[list[Any]]:
    """Spans as a record or the state keeps them."""
    return [[span.document_id, span.start, span.end] for span in spans]


def point_of(note: Note, part: str = "") -> dict[str, Any]:
    """A note as a point of a draft, at the very places where it stands: the words may occur elsewhere too."""
    return {"text": note.text, "quotes": [], "spans": places_of(note.spans), "part": part}


def placed(run: RunContext, claim: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    """The claim with the places of those quotes that are in the documents of `spans`, and the rest."""
    places = list(claim.get("spans", ()))
    left = []
    for quote in claim["quotes"]:
        found = places_of(verified(run, [quote], spans))
        places += found
        left += [] if found else [quote]
    return {**claim, "quotes": left, "spans": places}


def at_home(
    run: RunContext, made: Cut, reads: Mapping[str, str], points: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Merged points with the places of their quotes: in the read that quoted the same, or in any of these."""
    records = run.cache.get_many(list(reads.values()))
    homes: dict[str, list[Span]] = {}
    everywhere: list[Span] = []
    for number in sorted(reads, key=int):
        spans = [made.chunks[i].span for i in made.reads[int(number)].chunks]
        everywhere += spans
        for noted in stated(records[reads[number]]) or ():
            for quote in noted["quotes"]:
                homes.setdefault(quote, spans)
    found = []
    for point in points:
        home = [span for quote in point["quotes"] for span in homes.get(quote, ())]
        found.append(placed(run, placed(run, point, home), everywhere))
    return found


def spans_of(notes: Sequence[Note]) -> list[list[Any]]:
    """The notes' places as the state keeps them."""
    return [[s.document_id, s.start, s.end, note.confidence, "score"] for note in notes for s in note.spans]


@dataclass(frozen=True, slots=True)
class Merged:
    """The records of a level of a tree of merges, and what went wrong below: points left out, failures."""

    records: list[str]
    left_out: int = 0
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)


async def merge_level(run: RunContext, group: Sequence[str], fan_in: int) -> Merged:
    """Merge neighbours, at most `fan_in` at a time; a merge that fails is replaced by joining, by code."""
    if len(group) < 2:
        return Merged(list(group))
    size = -(-len(group) // -(-len(group) // fan_in))
    batches = [list(group[at : at + size]) for at in range(0, len(group), size)]
    return side_by_side(await asyncio.gather(*(_merge(run, batch) for batch in batches)))


def side_by_side(merged: Iterable[Merged]) -> Merged:
    """Several merges as one."""
    merged = list(merged)
    failures = {key: failure for one in merged for key, failure in one.failures.items()}
    records = [record for one in merged for record in one.records]
    return Merged(records, sum(one.left_out for one in merged), failures)


async def _merge(run: RunContext, batch: Sequence[str]) -> Merged:
    if len(batch) == 1:
        return Merged(list(batch))
    records = run.cache.get_many(list(batch))
    lists = [stated(records[key]) or [] for key in batch]
    shown = [_fitted(run.scope, points) for points in lists]
    pieces = [(f"notes {n}", "\n".join(lines)) for n, lines in enumerate(shown, 1)]
    result = await ask(run, run.scope.role(MERGE), run.scope.task.question, pieces, finishing=True)
    found = sum(map(len, lists))
    if isinstance(result, Record):
        return Merged([result.id], found - sum(map(len, shown)))
    points = _spread(lists, MAX_POINTS)
    left_out = found - len(points)
    said = f"{left_out} of its {found} points were left out" if left_out else "its points were joined"
    run.warn("merge_failed", f"a merge failed ({result.message}); {said}")
    key = keep_record(run, "joined", {"points": points, "no_information": not points})
    return Merged([key], left_out, {"merge": asdict(result)})


def _spread(lists: Sequence[Sequence[Any]], most: int) -> list[Any]:
    """At most `most` of all: the first of each list, then the second; of a row that is too long, evenly."""
    chosen: list[Any] = []
    for row in zip_longest(*lists):
        there = [one for one in row if one is not None]
        room = most - len(chosen)
        chosen += there if len(there) <= room else [there[at * len(there) // room] for at in range(room)]
    return chosen


def _fitted(scope: Scope, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The points as texts of at most one record's tokens; the last ones leave whole, never half a quote."""
    lines = [point["text"] + "".join(f'\n  "{quote}"' for quote in point["quotes"]) for point in points]
    while len(lines) > 1 and scope.text_tokens("\n".join(lines)) > scope.role(SUMMARISE).max_output:
        lines.pop()
    return lines


def outline(
    run: RunContext, made: Cut, groups: Sequence[Sequence[str]], reads: Mapping[str, str]
) -> tuple[str, int]:
    """The draft of a summary: the parts' points in order, under the parts' names.

    Returns its record id, and how many notes had to be left out.
    """
    points: list[dict[str, Any]] = []
    left_out = 0
    if run.scope.profile.writes:
        for number, (name, group) in enumerate(zip(made.parts, groups, strict=True)):
            mine = {n: key for n, key in reads.items() if made.reads[int(n)].part == number}
            records = run.cache.get_many(list(group)).values()
            merged = at_home(run, made, mine, [point for data in records for point in data["points"]])
            points += [{**point, "part": name} for point in merged]
    else:
        notes = notes_of(run, made, reads)
        left_out = max(0, len(notes) - MAX_POINTS)
        points = [point_of(n, made.parts[made.reads[n.read].part]) for n in _central(notes)]
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
    """Where those quotes stand that are in the documents of `spans`: inside these, if they are there."""
    documents = run.scope.documents
    verifier = run.scope.keep("verifier", lambda: Verifier(list(documents.values())))
    read = {span.document_id for span in spans}
    found = [verifier.verify(quote, shown=spans) for quote in quotes]
    return tuple(c.span for c in found if c.verdict == "supported" and c.span and c.span.document_id in read)


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
