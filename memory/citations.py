"""The check behind every quote that is shown: are these words in that source?

A quote is looked for as it is, then with white space, Unicode, quotes, dashes and case normalised, then with
line-end hyphens joined. Nothing is ever matched approximately: a changed digit is a different quote, and so
is a part of a number or of a word ("500" of "11,500", "able" of "unable"). What is shown is the source's own
text at the place found. The verdict says that the words are there, not that a claim follows from them.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterator, Sequence

from agentctx.memory.locate import locate
from agentctx.memory.normalise import LineEndHyphens, Normalised, has_line_end_hyphen, normalised
from agentctx.memory.types import Citation, Document, Span, Verdict

LEAST = 12  # characters other than white space; a shorter quote must be a whole line or cell
FRAGMENT_WORDS = 4
FRAGMENTS = 4

_ELLIPSIS = re.compile(r"\[?\.{3,}\]?|\[…\]|…")
_WRAPPING = " \n\t\"'“”‘’«»…"
_BROKEN_BEFORE = re.compile(r"(?<=\w)[-‐\xad]\s*\n\s*\Z")  # a word broken at a line end
_BROKEN_AFTER = re.compile(r"\A[-‐\xad]\s*\n\s*(?=\w)")
_IN_NUMBER = re.compile(r"(?<=\d)(?=[.,:/']?\d)|(?<=\d[.,:/'])(?=\d)")
_AROUND = 32  # characters on either side that tell whether a place is inside a word
_LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"


class Verifier:
    """Checks quotes against the documents of one run. Normal forms are made when first needed, and kept."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._texts = {document.id: _Text(document) for document in documents}

    def verify(
        self,
        quote: str,
        cited_id: str | None = None,
        claim: str = "",
        *,
        near: int | None = None,
        shown: Sequence[Span] = (),
    ) -> Citation:
        """Locate `quote`, which is said to come from the document `cited_id` (None: from any of them).

        Of several places the one closest to the offset `near` is taken, or the first. One that starts at
        `near` was chosen by code, and may cut a word.

        `supported`: it occurs in the cited document. `misattributed`: it occurs in another one; the true
        place is given. `stitched`: it occurs nowhere in one piece, but two to four fragments of one document
        cover it; the citation gives the first fragment's span and all fragments' text, and `fragments` gives
        every span. `not_found`: neither; the quote is then the caller's own.

        `shown`: what the writer of the quote was shown. A place inside one of these goes before all others,
        even if only a looser comparison finds it, and one elsewhere in their documents before the rest.
        """
        first = dict.fromkeys([cited_id] if cited_id is not None else (span.document_id for span in shown))
        cited = [self._texts[name] for name in first if name in self._texts]
        others = [text for name, text in self._texts.items() if name not in first]
        for texts, inside in ((cited if shown else [], shown), (cited, ()), (others, ())):
            if found := _first(texts, quote, near, inside):
                verdict: Verdict = "supported" if cited_id is None or texts is not others else "misattributed"
                return self._citation([found], verdict, claim)
        if spans := self.fragments(quote, cited_id):
            return self._citation(spans, "stitched", claim)
        source = self._texts[cited_id].document.source if cited_id in self._texts else ""
        return Citation(source, None, quote, "not_found", claim=claim)

    def fragments(self, quote: str, cited_id: str | None = None) -> list[Span]:
        """At most four spans of one document that cover `quote` word by word; none if there are no such.

        Each has at least four words. An ellipsis in the quote is a seam, not a word; a single span means that
        the source has nothing to leave out there. The cited document is tried first.
        """
        words = normalised(_ELLIPSIS.sub(" ", quote)).strip().strip("\"'").split()
        for text in sorted(self._texts.values(), key=lambda text: text.document.id != cited_id):
            if cuts := _cover(words, text):
                return [next(text.fragments(" ".join(words[start:end]))) for start, end in cuts]
        return []

    def _citation(self, spans: Sequence[Span], verdict: Verdict, claim: str) -> Citation:
        document = self._texts[spans[0].document_id].document
        page, locator = locate(document, spans[0])
        quote = " … ".join(document.text[span.start : span.end] for span in spans)
        return Citation(document.source, spans[0], quote, verdict, page, locator, claim)


class _Text:
    """One document with its normal forms."""

    def __init__(self, document: Document) -> None:
        self.document = document

    @functools.cached_property
    def normal(self) -> Normalised:
        return Normalised(self.document.text)

    @functools.cached_property
    def joined(self) -> tuple[Normalised, ...]:
        """With line-end hyphens dropped, and with only the line end dropped; nothing if there are none."""
        if not has_line_end_hyphen(self.document.text):
            return ()
        forms: tuple[LineEndHyphens, ...] = ("dropped", "kept")
        return tuple(Normalised(self.document.text, form) for form in forms)

    def exact(self, quote: str) -> Iterator[Span]:
        for start in _occurrences(self.document.text, quote):
            yield self._span(start, start + len(quote))

    def alike(self, quote: str) -> Iterator[Span]:
        yield from self._in_form(self.normal, normalised(quote).strip())

    def hyphenated(self, quote: str) -> Iterator[Span]:
        for form in self.joined:
            yield from self._in_form(form, Normalised(quote, "dropped").text.strip())
            yield from self._in_form(form, normalised(quote).strip())

    def fragments(self, words: str) -> Iterator[Span]:
        """The whole places of words in normal form."""
        return filter(self.is_whole, self._in_form(self.normal, words))

    def is_whole(self, span: Span) -> bool:
        """Whether the span cuts no number and no word at its ends."""
        return not (_cuts(self.document.text, span.start) or _cuts(self.document.text, span.end))

    def is_unit(self, span: Span) -> bool:
        """Whether the span is a whole line, or a whole cell of a table."""
        cell_ends = _LINE_ENDS + "\t|" + (',;"' if "csv" in self.document.media_type else "")
        text, gap = self.document.text, 200  # so many blanks are a gap between columns
        before = text[max(0, span.start - gap) : span.start].rstrip(" \xa0")[-1:]
        after = text[span.end : span.end + gap].lstrip(" \xa0")[:1]
        return before in cell_ends and after in cell_ends

    def _in_form(self, form: Normalised, quote: str) -> Iterator[Span]:
        for start in _occurrences(form.text, quote):
            yield self._span(*form.source_span(start, start + len(quote)))

    def _span(self, start: int, end: int) -> Span:
        return Span(self.document.id, start, end)


_Compare = Callable[[_Text, str], Iterator[Span]]


def _first(texts: Sequence[_Text], quote: str, near: int | None, inside: Sequence[Span] = ()) -> Span | None:
    """The place of the quote by the strictest comparison that finds one: the first, or the closest.

    Only places inside one of the spans `inside`, if there are any.
    """
    wrapped = quote.strip(_WRAPPING).removesuffix("...").removeprefix("...")
    comparisons: tuple[_Compare, ...] = (
        _Text.exact,
        _Text.alike,
        _Text.hyphenated,
    )
    if inside:
        comparisons = tuple(_within(inside, compare) for compare in comparisons)
    for wanted in dict.fromkeys((quote.strip(), wrapped.strip())):
        long_enough = len("".join(wanted.split())) >= LEAST
        for compare in comparisons:
            for text in texts:
                spans = (span for span in compare(text, wanted) if long_enough or text.is_unit(span))
                spans = (span for span in spans if span.start == near or text.is_whole(span))
                if near is None:
                    found = next(spans, None)
                else:
                    found = min(spans, key=lambda span: abs(span.start - near), default=None)
                if found:
                    return found
    return None


def _within(outer: Sequence[Span], compare: _Compare) -> _Compare:
    """The comparison, but only of places inside one of the spans."""

    def inside(text: _Text, wanted: str) -> Iterator[Span]:
        mine = [span for span in outer if span.document_id == text.document.id]
        for place in compare(text, wanted):
            if any(span.start <= place.start and place.end <= span.end for span in mine):
                yield place

    return inside


def _occurrences(text: str, wanted: str) -> Iterator[int]:
    start = text.find(wanted) if wanted else -1
    while start >= 0:
        yield start
        start = text.find(wanted, start + 1)


def _cuts(text: str, at: int) -> bool:
    """Whether the offset lies inside a number or between two letters of a script with cases.

    Other scripts write words without a gap between them. What is invisible, or breaks a word at a line end,
    is looked through.
    """
    left = normalised(_BROKEN_BEFORE.sub("", text[max(0, at - _AROUND) : at]))
    right = normalised(_BROKEN_AFTER.sub("", text[at : at + _AROUND]))
    letters = left[-1:] + right[:1]
    if len(letters) == 2 and all(letter.lower() != letter.upper() for letter in letters):
        return True
    return _IN_NUMBER.match(left + right, len(left)) is not None


def _cover(words: Sequence[str], text: _Text) -> list[tuple[int, int]]:
    """Cut `words` into at most four runs that `text` holds, of at least four words each; [] if impossible."""
    normal = text.normal.text
    if len(words) < 2 * FRAGMENT_WORDS or any(word not in normal for word in set(words)):
        return []

    def holds(start: int, end: int) -> bool:
        return any(True for _ in text.fragments(" ".join(words[start:end])))

    @functools.cache
    def reach(start: int) -> int:
        """The end of the longest run from `start` that the text holds (runs inside a held run are held)."""
        ends = range(start + FRAGMENT_WORDS + 1, len(words) + 1)
        return start + FRAGMENT_WORDS + bisect.bisect_left(ends, True, key=lambda end: not holds(start, end))

    @functools.cache
    def cover(start: int, runs: int) -> list[tuple[int, int]] | None:
        if start == len(words):
            return []
        if runs and start + FRAGMENT_WORDS <= len(words) and holds(start, start + FRAGMENT_WORDS):
            for end in range(reach(start), start + FRAGMENT_WORDS - 1, -1):
                if (rest := cover(end, runs - 1)) is not None:
                    return [(start, end), *rest]
        return None

    return cover(0, FRAGMENTS) or []
