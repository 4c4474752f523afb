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

    Lone surrogates become U+FFFD one for one, also in what locators say: no UTF-8 can hold them, and the
    offsets stay.
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
        locators += (_moved(at, offset) for at in part.locators)
        offset += len(part.text)
    return _encodable(GAP.join(texts)), tuple(locators)


def _moved(at: Locator, offset: int) -> Locator:
    value = _encodable(at.value) if isinstance(at.value, str) else at.value
    if not offset and value is at.value:
        return at
    return replace(at, start=at.start + offset, end=at.end + offset, value=value)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text
