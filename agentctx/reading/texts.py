"""The texts of a reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentctx.memory.errors import ConfigError, InputError
from agentctx.memory.offsets import Offsets
from agentctx.memory.types import Document, Span


@dataclass(frozen=True, slots=True)
class Text:
    """A text in a reading: its tokens are those of `offsets`, and the first of them is token `first`.

    `document` None: it was given as token ids, and nobody knows its characters.
    """

    document: Document | None
    offsets: Offsets
    first: int

    def tokens(self, start: int, end: int) -> range:
        """The tokens of the reading that hold these characters; ConfigError for characters it has not."""
        if self.document is None:
            raise ConfigError("what was read as token ids has no characters", hint="read the text itself")
        if not 0 <= start <= end <= self.offsets.characters:
            raise ConfigError(f"characters {start} to {end} are not in a text of {self.offsets.characters:,}")
        found = self.offsets.tokens(start, end)
        return range(self.first + found.start, self.first + found.stop)


def located(texts: Sequence[Text], places: Sequence[Span | tuple[int, int]]) -> list[range]:
    """The tokens of each place. A pair of characters is enough where there is one text only."""
    found = []
    for place in places:
        if isinstance(place, Span):
            named = place.document_id
            within = [text for text in texts if text.document and text.document.id == named]
            if not within:
                raise ConfigError(f"no text of this reading has the id {named[:12]}…: {place}")
            found += [text.tokens(place.start, place.end) for text in within]
        elif len(texts) > 1:
            raise ConfigError(f"characters {place} of which of {len(texts)} texts?", hint="give a Span")
        else:
            found.append(texts[0].tokens(*place))
    return found


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
