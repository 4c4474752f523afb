"""A read that the model refuses as too long is cut in two: its window was smaller than its profile says."""

from __future__ import annotations

from collections.abc import Sequence

from agentctx.memory.types import Document
from agentctx.workflows.ports import Counter
from agentctx.workflows.split import LEAST, split

Pieces = Sequence[tuple[str, str]]  # (label, text)


def halves(pieces: Pieces, sources: frozenset[str], counter: Counter) -> tuple[Pieces, Pieces] | None:
    """The pieces in two parts of about equal length, or None if they are too small to be cut.

    Several texts are parted between them, a single one inside, where `split` would. A piece whose label is
    none of the `sources`, such as what was found elsewhere, goes to both parts.
    """
    texts = [piece for piece in pieces if piece[0] in sources]
    beside = [piece for piece in pieces if piece[0] not in sources]
    if len(texts) > 1:
        whole = sum(len(text) for _, text in texts)
        sizes = [sum(len(text) for _, text in texts[:at]) for at in range(1, len(texts))]
        middle = 1 + min(range(len(sizes)), key=lambda at: abs(2 * sizes[at] - whole))
        return [*beside, *texts[:middle]], [*beside, *texts[middle:]]
    if not texts:
        return None
    [(label, text)] = texts
    tokens = counter.count_text(text)
    if tokens < 2 * LEAST:
        return None
    # A little more than half, because a cut at a boundary of the text falls short of its limit.
    end = split(Document.of(text), tokens * 3 // 5, counter)[0].span.end
    return [*beside, (label, text[:end])], [*beside, (label, text[end:])]
