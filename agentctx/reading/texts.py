"""The texts of a reading."""

from __future__ import annotations

from dataclasses import dataclass

from agentctx.memory.errors import InputError
from agentctx.memory.types import Document
from agentctx.reading.offsets import Offsets


@dataclass(frozen=True, slots=True)
class Text:
    """A text in a reading: its tokens are those of `offsets`, and the first of them is token `first`.

    `document` None: it was given as token ids, and nobody knows its characters.
    """

    document: Document | None
    offsets: Offsets
    first: int


def document_of(text: str, source: str = "<text>") -> Document:
    """A document of a text; InputError if it is not Unicode."""
    check_unicode(text)
    return Document.of(text, source)


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which no encoding of Unicode can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not Unicode: character {error.start} is half a surrogate pair",
            code="corrupt",
            hint="decode its bytes with the right encoding",
        ) from error
