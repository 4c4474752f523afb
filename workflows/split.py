"""Cut documents into chunks of at most `limit` tokens, and pack chunks into reads.

Token counts are not additive, so nothing here adds them up to make a chunk: every chunk is counted as it
will stand. Per chunk a secant search finds a window that is nearly full, then the best boundary in its
second half is counted exactly and taken: three or four counts of chunk-sized texts, whatever the limit, so
the cost is a few passes over the document.

Whatever the text: every chunk has at most `limit` tokens; the chunks joined are the document; every chunk
but the last has at least `limit / 2` tokens, unless a single character adds more than that; and the same
input gives the same cut.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from agentctx.memory.errors import ConfigError
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Chunk, Document, Span
from agentctx.workflows.ports import Counter

LEAST = 64  # tokens; below this the words around a cut cost more than the chunk holds

_FULL = 0.9  # a window at least this full is not searched any further
_AIM = 0.95
_CHARACTERS_PER_TOKEN = 4.0  # the first guess; afterwards the last chunk's own ratio
_AFTER_BLANK = r"(?:\A|(?<=\n\n)|(?<=\n\r\n))"
_HEADING = re.compile(
    r"^\#{1,6}[ \t]+\S"
    r"|^[^\n]{1,100}\n(?:={3,}|-{3,})[ \t]*$"
    rf"|{_AFTER_BLANK}(?:chapter|part|book|section|article|act|scene)\b[^\n]{{0,80}}$"
    rf"|{_AFTER_BLANK}(?:\d+(?:\.\d+)*\.?|[IVXLC]+\.)[ \t]+\w[^\n.!?]{{0,80}}\r?\n\r?\n",
    re.MULTILINE | re.IGNORECASE,
)
_PARAGRAPH = re.compile(r"\n[ \t\r]*+\n\s*")
_WHITE_SPACE = (" ", "\n", "\t", "\r", "\u3000", "\xa0", "\u2009")
_STRUCTURE = frozenset({"heading", "chapter", "slide", "sheet"})


def split(document: Document, limit: int, counter: Counter) -> list[Chunk]:
    """Chunks of at most `limit` tokens, each on its own; together they are the document.

    A chunk ends, in the second half of what would fit, before a heading, else after a blank line, a
    sentence, white space, or any character. An empty document has no chunks. Raises ConfigError if
    `limit` is below 64, or below what a single character takes.
    """
    if limit < LEAST:
        raise ConfigError(f"chunks of {limit} tokens are too small", hint=f"allow at least {LEAST} tokens")
    text = document.text
    boundaries = _Boundaries(document)
    chunks: list[Chunk] = []
    start, ratio = 0, _CHARACTERS_PER_TOKEN
    while start < len(text):
        window, tokens = _window(text, start, limit, ratio, counter)
        if window < len(text):
            window, tokens = _best_cut(text, start, (window, tokens), limit, boundaries, counter)
        ratio = (window - start) / max(tokens, 1)
        chunks.append(Chunk(Span(document.id, start, window), tokens))
        start = window
    return chunks


def split_many(documents: Sequence[Document], limit: int, counter: Counter) -> list[Chunk]:
    """The chunks of all documents, in order. No chunk crosses from one document into the next."""
    return [chunk for document in documents for chunk in split(document, limit, counter)]


def pack(chunks: Sequence[Chunk], limit: int, *, label_tokens: int = 0) -> list[list[Chunk]]:
    """Put neighbours into one read while the sum of (tokens + label_tokens) stays within `limit`.

    Order is kept and every chunk appears once. Raises ConfigError if a chunk alone is over the limit.
    """
    packs: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        need = chunk.tokens + label_tokens
        if need > limit:
            raise ConfigError(
                f"a chunk of {chunk.tokens} tokens and its label of {label_tokens} are over {limit}",
                hint="split into smaller chunks",
            )
        if not packs or need > room:
            packs.append([])
            room = limit
        packs[-1].append(chunk)
        room -= need
    return packs


def text_of(chunk: Chunk, documents: Mapping[str, Document]) -> str:
    """The chunk's own characters, from the documents by id."""
    return documents[chunk.span.document_id].text[chunk.span.start : chunk.span.end]


def _window(text: str, start: int, limit: int, ratio: float, counter: Counter) -> tuple[int, int]:
    """Find an end whose text fits the limit and nearly fills it, or reaches the end of the text.

    Secant steps at first; bisection after eight, so that a hostile density costs a logarithm.
    """
    low, low_tokens = start, 0
    high, high_tokens = len(text) + 1, 0  # not known to be too much until counted
    end = start + int(limit * _AIM * ratio)
    for step in itertools.count():
        end = max(low + 1, min(end, high - 1))
        tokens = counter.count_text(text[start:end])
        if tokens <= limit:
            low, low_tokens = end, tokens
            if end == len(text) or tokens >= limit * _FULL or high - low <= 1:
                break
        else:
            high, high_tokens = end, tokens
            if high - low <= 1:
                break
        if not high_tokens:  # grow at most fourfold: a count costs as much as the text is long
            growth = min(limit * _AIM / max(low_tokens, 1), 4.0)
            end = start + int((end - start) * growth) + 1
        elif step < 8:
            share = (limit * _AIM - low_tokens) / max(high_tokens - low_tokens, 1)
            end = low + int((high - low) * share)
        else:
            end = (low + high) // 2
            if low_tokens * 2 >= limit:
                break
    if low == start:
        raise ConfigError(
            f"the character {text[start]!r} alone takes more than {limit} tokens", hint="raise the limit"
        )
    return low, low_tokens


def _best_cut(
    text: str,
    start: int,
    window: tuple[int, int],
    limit: int,
    boundaries: _Boundaries,
    counter: Counter,
) -> tuple[int, int]:
    """Take the best boundary whose chunk has between half the limit and the limit; else the window itself."""
    end, end_tokens = window
    least = -(-limit // 2)
    floor = start + int((end - start) * least / max(end_tokens, 1))
    for cut in boundaries.best_first(floor, end):
        tokens = end_tokens if cut == end else counter.count_text(text[start:cut])
        if least <= tokens <= limit:
            return cut, tokens
    return window


class _Boundaries:
    """Where a document may be cut, by rank."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._text = document.text

    @functools.cached_property
    def _ranks(self) -> tuple[list[int], list[int], list[int]]:
        """Not needed for a document that fits as it is."""
        structure = {place.start for place in self._document.locators if place.kind in _STRUCTURE}
        headings = {match.start() for match in _HEADING.finditer(self._text)}
        return (
            sorted(structure | headings),
            [match.end() for match in _PARAGRAPH.finditer(self._text)],
            [start for start, _ in sentences(self._text)],
        )

    def best_first(self, floor: int, end: int) -> Iterator[int]:
        """Yield, per rank, the last boundary in (floor, end]: there are at most five to try."""
        for positions in self._ranks:
            index = bisect.bisect_right(positions, end) - 1
            if index >= 0 and positions[index] > floor:
                yield positions[index]
        space = max(self._text.rfind(blank, floor, end) for blank in _WHITE_SPACE)
        if space >= 0:
            yield space + 1
        yield end
