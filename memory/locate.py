"""From a span to the place where a reader would look it up: its page, and the innermost locator around it."""

from __future__ import annotations

import bisect

from agentctx.memory.types import Document, Locator, Span


def locate(document: Document, span: Span) -> tuple[int | None, Locator | None]:
    """The page number and the innermost locator that hold the start of `span`; None where there is none."""
    begun = bisect.bisect_right(document.locators, span.start, key=lambda locator: locator.start)
    around = [locator for locator in document.locators[:begun] if locator.end > span.start]
    pages = (place.value for place in around if place.kind == "page" and isinstance(place.value, int))
    return next(pages, None), max(around, key=lambda place: (place.start, -place.end), default=None)
