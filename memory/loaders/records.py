"""CSV, TSV, JSON and JSON Lines: the text is exactly the decoded file, with a locator for each record.

Rows and lines are counted from 1 as an editor or a spreadsheet does, the header included. A JSON array gives
one record per element, counted from 1, an object one per key. A file that breaks its format keeps its text
and the locators up to the break, with the notice `malformed`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from agentctx.memory.loaders.decode import decode
from agentctx.memory.loaders.parts import Part
from agentctx.memory.types import Locator, Notice

Records = Callable[[str], Iterator[Locator]]
JSON_GAP = re.compile(r"[ \t\r\n]*")


def read_csv(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """Comma-separated rows; also with semicolon, tab or bar if the first line has more of these."""
    return _read(file, encoding, _rows)


def read_json(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """The elements of an array or the members of an object."""
    return _read(file, encoding, _elements)


def read_jsonl(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """One record per line that is not blank."""
    return _read(file, encoding, _lines)


def _read(file: BinaryIO, encoding: str | None, records: Records) -> Iterator[Part]:
    decoded = decode(file.read(), encoding)
    locators: list[Locator] = []
    notices = list(decoded.notices)
    try:
        for locator in records(decoded.text):
            locators.append(locator)
    except (csv.Error, ValueError, RecursionError) as error:
        notices.append(Notice("malformed", f"kept as text, {len(locators)} records told apart: {error}"))
    yield Part(decoded.text, tuple(locators), tuple(notices))


def _rows(text: str) -> Iterator[Locator]:
    """Offsets come from counting what the csv reader took: it splits no line itself."""
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in io.StringIO(text, newline=""):
            taken += len(line)
            yield line

    header = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(",;\t|", key=header.count)
    start = 0
    for number, row in enumerate(csv.reader(lines(), delimiter=delimiter), 1):
        if row:
            yield Locator(start, _without_line_end(text, start, taken), "row", number)
        start = taken


def _without_line_end(text: str, start: int, end: int) -> int:
    while end > start and text[end - 1] in "\r\n":
        end -= 1
    return end


def _lines(text: str) -> Iterator[Locator]:
    start = 0
    for number, line in enumerate(io.StringIO(text, newline=""), 1):
        if line.strip():
            yield Locator(start, start + len(line.rstrip("\r\n")), "line", number)
        start += len(line)


def _elements(text: str) -> Iterator[Locator]:
    decode_value = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    opening = text[at : at + 1]
    if opening not in ("[", "{"):
        decode_value(text, at)
        return
    closing = "]" if opening == "[" else "}"
    at = _skip(text, at + 1)
    key: int | str
    number = 0
    while text[at : at + 1] != closing:
        number += 1
        start, key = at, number
        if opening == "{":
            key, at = decode_value(text, at)
            if not isinstance(key, str):
                raise ValueError(f"expected a key at character {start}")
            at = _skip(text, _expect(text, _skip(text, at), ":"))
        _, at = decode_value(text, at)
        yield Locator(start, at, "record", key)
        at = _skip(text, at)
        if text[at : at + 1] != closing:
            at = _skip(text, _expect(text, at, ","))


def _skip(text: str, at: int) -> int:
    match = JSON_GAP.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise ValueError(f"expected {mark!r} at character {at}")
    return at + 1
