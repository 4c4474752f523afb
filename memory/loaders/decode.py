"""Bytes to text: byte order mark, strict UTF-8, a guess from the first 64 KiB, then with replacements.

Nothing is translated or normalised, only the byte order mark goes. A guess is said to be one: detectors take
one 8-bit code page for another. UTF-8 with a few broken bytes is kept as UTF-8, since a guess would turn all
its other letters into noise.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from agentctx.memory.errors import InputError
from agentctx.memory.types import Notice

SNIFF_BYTES = 8 * 1024  # a NUL in here means binary
GUESS_BYTES = 64 * 1024
MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A text, the encoding it was taken for, and what a reader of it should know."""

    text: str
    encoding: str
    notices: tuple[Notice, ...] = ()


def decode(data: bytes, encoding: str | None = None, *, declared: str | None = None) -> Decoded:
    """Decode all of `data`. `encoding` is the user's word and wins; `declared` is the file's own claim.

    Raises InputError `binary` for data that is no text. Broken bytes never raise: each becomes U+FFFD.
    """
    for mark, name in MARKS:
        if data.startswith(mark) and encoding in (None, name):
            return _finish(data[len(mark) :], name)
    if encoding:
        return _finish(data, encoding)
    if b"\0" in data[:SNIFF_BYTES]:
        hint = "if it is text, name its encoding: --encoding 'GLOB=utf-16-le'"
        raise InputError("a binary file, not text", code="binary", hint=hint)
    try:
        return Decoded(data.decode(), "utf-8")
    except UnicodeDecodeError:
        pass
    lenient = data.decode(errors="replace")
    if _mostly_utf8(lenient):
        return _finish(data, "utf-8")
    guess = declared and codec_of(declared)
    if not guess or guess.startswith("utf-"):  # UTF-8 was just found not to fit, the others hold NULs
        guess = _guess(data)
    if not guess:
        return _finish(data, "utf-8")
    notice = Notice("encoding_guessed", f"not UTF-8, read as {guess}; --encoding names another")
    return _finish(data, guess, notice)


def _finish(data: bytes, encoding: str, *notices: Notice) -> Decoded:
    try:
        return Decoded(data.decode(encoding), encoding, notices)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    genuine = data.count("\ufffd".encode()) if encoding == "utf-8" else 0
    count = max(text.count("\ufffd") - genuine, 1)
    message = f"{count} broken bytes or sequences in {encoding}, each replaced by U+FFFD"
    return Decoded(text, encoding, (*notices, Notice("encoding_damaged", message)))


def _mostly_utf8(lenient: str) -> bool:
    """True if more non-ASCII letters decoded than broke; in an 8-bit encoding hardly any decodes."""
    broken = lenient.count("\ufffd")
    beyond_ascii = len(lenient) - len(lenient.encode("ascii", "ignore"))
    return beyond_ascii - broken > broken


def codec_of(name: str) -> str | None:
    """Python's own name of a text encoding, None if it has none of that name."""
    try:
        b".".decode(name)  # an empty text would be decoded without a look at the name
    except UnicodeDecodeError:
        pass  # it exists, one byte is not enough for it
    except (LookupError, ValueError):
        return None
    return codecs.lookup(name).name


def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    head = data[:GUESS_BYTES]
    if len(data) > GUESS_BYTES and (line_end := head.rfind(b"\n")) > 0:
        head = head[: line_end + 1]  # a cut through a character would mislead the detector
    best = from_bytes(head).best()
    return best.encoding if best else None
