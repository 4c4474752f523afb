"""What an acting model may do: look into the sources, and bring back what it has seen. Nothing else.

A tool takes no path, address or program. It returns text of the sources, which is shown between delimiters
like any other, and says which stretches of them it showed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agentctx.memory.lexical import Lexical
from agentctx.memory.types import Chunk, Document, Span
from agentctx.workflows.rank import FirstStage
from agentctx.workflows.scope import Scope
from agentctx.workflows.worklog import Entry, WorkLog

PASSAGE_TOKENS = 200
FOUND = 3  # passages that one search shows
MOST_LINES = 80
MOST_HITS = 20
AROUND = 200  # characters on either side of a hit that are shown
Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool gave. A mistake of the model is a result too: it is told what would have worked."""

    text: str
    shown: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """`usage` is what the model reads of it. `prepare` makes what takes long, outside the event loop."""

    usage: str
    run: Callable[[Scope, WorkLog, Arguments], Result]
    prepare: Callable[[Scope], object] | None = None


def find(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """The passages that share most with some words."""
    words = str(given.get("words", "")).strip()
    if not words:
        return Result('find needs "words"')
    passages, scores = _passages(scope), _index(scope).scores(words)
    best = [i for i in sorted(range(len(passages)), key=lambda i: -scores[i])[:FOUND] if scores[i] > 0]
    if not best:
        return Result(f"nothing in the sources shares a word with {words!r}")
    spans = tuple(passages[i].span for i in sorted(best))
    return Result("\n---\n".join(_placed(scope, span) for span in spans), spans)


def _passages(scope: Scope) -> list[Chunk]:
    return scope.chunks(min(PASSAGE_TOKENS, scope.profile.window // 8))


def _index(scope: Scope) -> FirstStage:
    return scope.keep("tools.find", lambda: FirstStage([scope.text(p.span) for p in _passages(scope)]))


def read(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """Lines of one source."""
    document = _named(scope, str(given.get("source", "")))
    if document is None:
        return Result(f"there is no such source; the sources are: {', '.join(scope.labels()[:20])}")
    starts = _line_starts(scope, document)
    try:
        first, last = int(given.get("first", 1)), int(given.get("last", given.get("first", 1)))
    except (TypeError, ValueError):
        return Result('read needs numbers for "first" and "last"')
    if not 1 <= first <= last or first > len(starts):
        return Result(f"{document.source} has lines 1 to {len(starts)}")
    last = min(last, len(starts), first + MOST_LINES - 1)
    end = starts[last] if last < len(starts) else len(document.text)
    span = Span(document.id, starts[first - 1], end)
    return Result(_placed(scope, span), (span,))


def grep(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """The lines that hold some text, upper and lower case alike; of a long line, the part around it."""
    text = str(given.get("text", "")).strip()
    if not text:
        return Result('grep needs "text"')
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    lines: list[str] = []
    spans: list[Span] = []
    hits = 0
    for document in scope.documents.values():
        starts = _line_starts(scope, document)
        for hit in pattern.finditer(document.text):
            hits += 1
            if len(lines) == MOST_HITS:
                continue
            number = bisect_right(starts, hit.start())
            end = starts[number] if number < len(starts) else len(document.text)
            start = max(starts[number - 1], hit.start() - AROUND)
            span = Span(document.id, start, min(end, hit.end() + AROUND))
            lines.append(f"{document.source}:{number}: {scope.text(span).strip()}")
            spans.append(span)
    if not hits:
        return Result(f"no line holds {text!r}")
    more = f"\n({hits} places in all)" if hits > len(lines) else ""
    return Result("\n".join(lines) + more, tuple(spans))


def recall(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """An archived entry, byte for byte."""
    wanted = str(given.get("id", ""))
    entry = log.entry(wanted)
    if entry is None:
        return Result(f"there is no entry {wanted!r}; the ids are: {', '.join(e.id for e in log.entries)}")
    return Result(log.text(entry))


def archive(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """Shelve an entry under a title; it can be recalled."""
    wanted = str(given.get("id", ""))
    if not log.archive(wanted, str(given.get("title", ""))):
        return Result(f"there is no entry {wanted!r}; the ids are: {', '.join(e.id for e in log.entries)}")
    return Result(f"{wanted} is archived")


def search_archive(scope: Scope, log: WorkLog, given: Arguments) -> Result:
    """The archived entries that share most with some words."""
    words = str(given.get("words", "")).strip()
    entries: list[Entry] = [entry for entry in log.entries if not entry.live]
    if not words or not entries:
        return Result('search_archive needs "words"' if entries else "the archive is empty")
    scores = Lexical([f"{entry.title} {log.text(entry)}" for entry in entries]).scores(words)
    best = [i for i in sorted(range(len(entries)), key=lambda i: -scores[i])[:8] if scores[i] > 0]
    lines = [f"{entries[i].id}: {entries[i].title}" for i in best]
    return Result("\n".join(lines) or f"no archived entry shares a word with {words!r}")


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "find": Tool('{"words": "..."}: the passages that share most with these words', find, _index),
        "grep": Tool('{"text": "..."}: the lines that hold this text', grep),
        "read": Tool('{"source": "...", "first": 1, "last": 40}: lines of a source', read),
        "archive": Tool('{"id": "e3", "title": "..."}: shelve an entry under a title', archive),
        "recall": Tool('{"id": "e3"}: an earlier entry, word for word', recall),
        "search_archive": Tool('{"words": "..."}: earlier entries by their words', search_archive),
    }
)


def _placed(scope: Scope, span: Span) -> str:
    document = scope.documents[span.document_id]
    line = document.text.count("\n", 0, span.start) + 1
    return f"{document.source}, from line {line}:\n{scope.text(span)}"


def _named(scope: Scope, name: str) -> Document | None:
    """The source of that name, or the only one whose name ends like it."""
    documents = scope.documents.values()
    exact = [document for document in documents if document.source == name]
    like = [document for document in documents if name and document.source.endswith(name)]
    return exact[0] if exact else like[0] if len(like) == 1 else None


def _line_starts(scope: Scope, document: Document) -> list[int]:
    """Where each line begins."""

    def starts() -> list[int]:
        found = [0]
        while (at := document.text.find("\n", found[-1])) >= 0 and at + 1 < len(document.text):
            found.append(at + 1)
        return found

    return scope.keep(("lines", document.id), starts)
