"""Headings to locators: a section runs to the next heading and goes by its path, "Results > Costs"."""

from __future__ import annotations

from collections.abc import Iterable

from agentctx.memory.types import Locator

Heading = tuple[int, int, str]  # offset, level (1 is the outermost), title


def sections(headings: Iterable[Heading], end: int) -> tuple[Locator, ...]:
    """One locator per heading, in order, without overlap; the last one runs to `end`."""
    path: list[tuple[int, str]] = []
    starts: list[tuple[int, str]] = []
    for offset, level, title in headings:
        while path and path[-1][0] >= level:
            path.pop()
        path.append((level, title))
        starts.append((offset, " > ".join(title for _, title in path)))
    stops = [start for start, _ in starts[1:]] + [end]
    return tuple(
        Locator(start, stop, "heading", value) for (start, value), stop in zip(starts, stops, strict=False)
    )
