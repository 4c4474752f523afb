"""A text as quotes are compared, with the way back to its own offsets.

Two texts that differ in white space, Unicode form (NFKC), case, the shape of quotes and dashes, soft hyphens
or zero-width characters have the same normal form; texts that differ in anything else do not. The map back
is kept as break points only, one for each place where the lengths differ, so that megabytes cost about what
one `str.translate` and one regular-expression scan cost.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from collections.abc import Iterator
from typing import Literal

LineEndHyphens = Literal["as is", "dropped", "kept"]

_INVISIBLE = "\xad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff"
_SAME_LENGTH = str.maketrans(
    {
        **dict.fromkeys("\r\v\f\x85\u2028\u2029", "\n"),
        **dict.fromkeys("\t\x1c\x1d\x1e\x1f\xa0\u1680\u202f\u205f\u3000", " "),
        **dict.fromkeys(map(chr, range(0x2000, 0x200B)), " "),
        **dict.fromkeys("‘’‚‛′´`ʼʹ＇", "'"),
        **dict.fromkeys("“”„‟″«»＂〝〞", '"'),
        **dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"),
    }
)
_SPACE = rf"[{_INVISIBLE}]*[ \n][ \n{_INVISIBLE}]+|[{_INVISIBLE}]+[ \n][ \n{_INVISIBLE}]*"
_UNEVEN = rf"(?P<space>{_SPACE})|(?P<invisible>[{_INVISIBLE}]+)|(?P<dash>--+)"
_BREAK = rf"(?<=\w)[-\xad][ {_INVISIBLE}]*\n[ \n{_INVISIBLE}]*(?=\w)"


class Normalised:
    """The normal form of `text`; `source_span` leads back from it.

    `hyphens` says what becomes of a hyphen at a line's end inside a word: it and the line end stay, both are
    dropped ("exam-⏎ple" is "example"), or the hyphen is kept and the line end dropped ("well-⏎known" is
    "well-known").
    """

    def __init__(self, text: str, hyphens: LineEndHyphens = "as is") -> None:
        self._target_starts: list[int] = []
        self._source_starts: list[int] = []
        parts: list[str] = []
        source = target = 0
        for length, part in _parts(text, hyphens):
            self._source_starts.append(source)
            self._target_starts.append(target)
            parts.append(part)
            source += length
            target += len(part)
        self._source_starts.append(source)
        self._target_starts.append(target)
        self.text = "".join(parts)

    def source_span(self, start: int, end: int) -> tuple[int, int]:
        """The source offsets of `self.text[start:end]`, which must not be empty.

        What is one character here and several there, or the reverse, is taken whole.
        """
        return self._source_of(start)[0], self._source_of(end - 1)[1]

    def _source_of(self, target: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._target_starts, target) - 1
        source, next_source = self._source_starts[part], self._source_starts[part + 1]
        if source == next_source:
            source = self._source_starts[part - 1]
        offset = target - self._target_starts[part]
        if next_source - source == self._target_starts[part + 1] - self._target_starts[part]:
            return source + offset, source + offset + 1
        return source, next_source


def normalised(text: str) -> str:
    """The normal form alone."""
    return "".join(part for _, part in _parts(text, "as is"))


def has_line_end_hyphen(text: str) -> bool:
    """Whether joining line-end hyphens would change the normal form of `text`."""
    return re.search(_BREAK, text.translate(_SAME_LENGTH)) is not None


def _parts(text: str, hyphens: LineEndHyphens) -> Iterator[tuple[int, str]]:
    """Yield (source length, normal form) for the stretches of the text, in order.

    Where both lengths are equal the stretch corresponds character by character. A length of 0 goes on with
    the stretch before.
    """
    even = text.translate(_SAME_LENGTH)
    simple = unicodedata.is_normalized("NFKC", even) and len(even.casefold()) == len(even)
    position = 0
    for match in _scanner(simple, hyphens != "as is").finditer(even):
        if match.start() > position:
            yield match.start() - position, _folded(even[position : match.start()])
        kind, length = match.lastgroup, match.end() - match.start()
        if kind == "composed":
            yield from _composed(match.group())
        else:
            hyphen = "-" if hyphens == "kept" else ""
            yield length, {"space": " ", "dash": "-", "invisible": "", "break": hyphen}[kind or ""]
        position = match.end()
    if position < len(even):
        yield len(even) - position, _folded(even[position:])


def _composed(run: str) -> Iterator[tuple[int, str]]:
    """Normalise a run outside ASCII: at once if nothing changes length, else cluster by cluster."""
    if unicodedata.is_normalized("NFKC", run) and len(folded := _folded(run)) == len(run):
        yield len(run), folded
        return
    for cluster in re.findall(rf".[{_marks()}]*", run, re.DOTALL):
        composed = _folded(unicodedata.normalize("NFKC", cluster).translate(_SAME_LENGTH))
        if len(composed) == len(cluster) > 1:  # no letter by letter correspondence: the first takes it all
            yield len(cluster), composed[0]
            yield 0, composed[1:]
        else:
            yield len(cluster), composed


def _folded(text: str) -> str:
    return text.replace("\n", " ").casefold()


@functools.cache
def _scanner(simple: bool, join: bool) -> re.Pattern[str]:
    """Find what does not map character by character. A simple text needs no Unicode composition."""
    pattern = f"(?P<break>{_BREAK})|{_UNEVEN}" if join else _UNEVEN
    if not simple:
        other = rf"[^\x00-\x7f{_INVISIBLE}]"
        pattern += rf"|(?P<composed>[\x00-\x7f][{_marks()}]+{other}*|{other}+)"
    return re.compile(pattern)


@functools.cache
def _marks() -> str:
    """Characters that join the one before: marks, Hangul vowels and finals, half-width kana marks."""
    ranges = ["\u1160-\u11ff\uff9e\uff9f\U000e0100-\U000e01ef"]
    start: int | None = None
    for code in range(0x300, 0x1F000):  # above lie symbols and Han
        mark = unicodedata.category(chr(code))[0] == "M" and not 0xFE00 <= code <= 0xFE0F
        if mark and start is None:
            start = code
        elif not mark and start is not None:
            ranges.append(f"{chr(start)}-{chr(code - 1)}")
            start = None
    return "".join(ranges)
