"""Coverage of several ways of cutting the same text, as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from agentctx.memory.types import Chunk, Span
from agentctx.workflows.conclude import Covered


def combined(parts: Sequence[Covered]) -> Covered:
    """By the chunks of the finest cut: one counts as read if what was read, in any cut, holds all of it."""
    finest = max(parts, key=lambda part: len(part.chunks))
    read = _joined(part.chunks[i].span for part in parts for i in part.read)
    failed = _joined(part.chunks[i].span for part in parts for i in part.failed)
    scored = _joined(part.chunks[i].span for part in parts for i in part.scored)
    inside = frozenset(i for i, chunk in enumerate(finest.chunks) if _holds(read, chunk))
    return Covered(
        finest.chunks,
        read=inside,
        failed=frozenset(i for i, c in enumerate(finest.chunks) if _holds(failed, c)) - inside,
        scored=frozenset(i for i, c in enumerate(finest.chunks) if _holds(scored, c)),
    )


def _joined(spans: Iterable[Span]) -> dict[str, list[tuple[int, int]]]:
    """The stretches of each document, neighbours and overlaps as one."""
    places: dict[str, list[tuple[int, int]]] = {}
    for span in sorted(spans):
        mine = places.setdefault(span.document_id, [])
        if mine and span.start <= mine[-1][1]:
            mine[-1] = (mine[-1][0], max(mine[-1][1], span.end))
        else:
            mine.append((span.start, span.end))
    return places


def _holds(places: dict[str, list[tuple[int, int]]], chunk: Chunk) -> bool:
    span: Span = chunk.span
    mine = places.get(span.document_id, [])
    at = bisect_right(mine, (span.start, float("inf"))) - 1
    return at >= 0 and span.end <= mine[at][1]
