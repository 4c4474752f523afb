"""What a reader gives: the text in parts, so that the parts before a fault are never lost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from agentctx.memory.types import Locator, Notice

GAP = "\n\n"  # between parts; belongs to none of them
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Part:
    """A page, a chapter, a sheet, or all of a text file.

    `locators` count from the start of the part and are sorted by their start.
    """

    text: str
    locators: tuple[Locator, ...] = ()
    notices: tuple[Notice, ...] = ()  # their source is filled in later

    @classmethod
    def whole(cls, text: str, kind: str, value: int | str, inner: Iterable[Locator] = ()) -> Part:
        """A part that one locator covers, with `inner` ones inside it."""
        return cls(text, (Locator(0, len(text), kind, value), *inner))


def join(parts: Iterable[Part]) -> tuple[str, tuple[Locator, ...]]:
    """The text of all parts, and the locators moved to where the parts came to stand.

    Lone surrogates become U+FFFD one for one: no UTF-8 can hold them, and the offsets stay.
    """
    texts: list[str] = []
    locators: list[Locator] = []
    offset = 0
    for part in parts:
        if not part.text and not part.locators:
            continue  # it only brings a notice
        if texts:
            offset += len(GAP)
        texts.append(part.text)
        if offset:
            locators += (replace(at, start=at.start + offset, end=at.end + offset) for at in part.locators)
        else:
            locators += part.locators
        offset += len(part.text)
    text = GAP.join(texts)
    if not _encodable(text):
        text = SURROGATE.sub("\ufffd", text)
    return text, tuple(locators)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
