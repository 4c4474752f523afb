"""Sentences as exact offsets: the unit in which evidence is scored, picked and shown.

A rule, not a model: it must be exact, fast (a megabyte in a fraction of a second) and the same everywhere.
Lines end sentences, because list items, table rows, headings, records and code are lines; only a line that
was evidently wrapped (long, and its successor's first word would not have fitted, or goes on in lower case)
is joined to the next. Inside, a full stop ends a sentence unless it belongs to an abbreviation, an initial
or a list number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

LONGEST = 600  # characters; more is cut at a clause, else at white space

_TERMINAL = re.compile(
    r"(?P<latin>(?<![.!?…])[.!?…]++[\"'”’»)\]*_]*(?:\[\d{1,3}\])*)(?=\s)"
    r"|[。！？｡]+[」』”’）】]*"
    r"|(?<![।॥۔؟])[।॥۔؟]++(?=\s)"
)
_LINE = re.compile(r"[^\n\r\v\f\x85\u2028\u2029]*(?:\r\n|[\n\r\v\f\x85\u2028\u2029]|\Z)")
_ITEM = re.compile(r"(?:[-*+•‣◦·–—>]|#{1,6}|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)])\s")
_MARKER = re.compile(r"\W*(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})\.")
_TIMESTAMP = re.compile(r"\[?(?:\d{4}-\d\d-\d\d|\d\d:\d\d)")
# Code, table rows and records: their line ends mean something.
_RECORD = re.compile(r"[{}<>=|\\\t]|;$|\w\(|\S {3,}\S|,[^\s,]*,[^\s,]*,[^\s,]")
_CLAUSE = re.compile(r"[;:]\s|[；：]")
_COMMA = re.compile(r",\s|[，、]|\s[-–—]\s")
_SPACE = re.compile(r"\s")


def _words(line: str) -> frozenset[str]:
    return frozenset(line.split())


_TITLES = _words(
    "mr mrs ms dr prof st rev hon gov sen rep gen col sgt capt lt cmdr maj messrs mme mlle fr sir vs cf viz "
    "e.g i.e eg ie approx dept univ hr frau z.b d.h u.a bzw"
)
_BEFORE_NUMBERS = _words(
    "no nos nr p pp fig figs vol vols sec secs ch chap eq eqs art arts par para ps tab ver v c ca "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_MAY_END = _words("etc inc ltd co corp jr sr bros al est ave blvd rd")
_STARTERS = _words(
    "the a an he she it we they i you this that these those there his her its our their my your in on at by "
    "for from with to of as if when while after before but and or so yet however although because since what "
    "who why how where not no"
)


def sentences(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Offsets of the sentences of `text[start:end]`, in order, without the white space between them.

    Every other character lies in exactly one sentence; none is longer than `LONGEST` characters.
    """
    return [
        piece
        for block in _blocks(text, start, len(text) if end is None else end)
        for sentence in _in_block(text, *block)
        for piece in _at_most(text, *sentence)
    ]


def _blocks(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield stretches that hold no meaningful line end."""
    paragraph: list[tuple[int, int]] = []
    for match in _LINE.finditer(text, start, end):
        line = _trimmed(text, *match.span())
        if line[0] < line[1]:
            paragraph.append(line)
        else:
            yield from _unwrapped(text, paragraph)
            paragraph = []
    yield from _unwrapped(text, paragraph)


def _unwrapped(text: str, lines: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    if not lines:
        return
    width = max(end - start for start, end in lines)
    first = lines[0][0]
    for (start, end), (next_start, next_end) in pairwise(lines):
        if not _goes_on(text[start:end], text[next_start:next_end], width):
            yield first, end
            first = next_start
    yield first, lines[-1][1]


def _goes_on(line: str, following: str, width: int) -> bool:
    """True if the end of `line` is there only because the line was full."""
    if (
        not 40 <= len(line) <= 160
        or line.startswith("#")
        or _ITEM.match(following)
        or _TIMESTAMP.match(following)
    ):
        return False
    if not following[0].islower() and len(line) + 1 + len(following.split(None, 1)[0]) <= width:
        return False
    return not (_RECORD.search(line) or _RECORD.search(following, 0, 160))


def _in_block(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _TERMINAL.finditer(text, start, end):
        if match.end() < end and (match.lastgroup is None or _ends(text, start, match)):
            yield start, match.end()
            start = _trimmed(text, match.end(), end)[0]
    if start < end:
        yield start, end


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a Latin full stop, question or exclamation mark ends the sentence begun at `start`."""
    following = text[match.end() : match.end() + 24].lstrip()
    if following[:1].islower():
        return False
    if match.group() != ".":
        return True
    word = re.split(r"[\s(\[\"'“‘—–/]", text[max(start, match.start() - 24) : match.start()])[-1]
    known = word.casefold()
    if known in _TITLES or (match.end() - start < 12 and _MARKER.fullmatch(text, start, match.end())):
        return False
    if known in _BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if known in _MAY_END or "." in word or (len(word) == 1 and word.isupper()):
        return re.split(r"\W", following.casefold(), maxsplit=1)[0] in _STARTERS
    return True


def _at_most(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > LONGEST:
        cut = start + LONGEST
        for boundary in (_CLAUSE, _COMMA, _SPACE):
            ends = [match.end() for match in boundary.finditer(text, start + LONGEST // 2, cut)]
            if ends:
                cut = ends[-1]
                break
        yield _trimmed(text, start, cut)
        start = _trimmed(text, cut, end)[0]
    yield start, end


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
