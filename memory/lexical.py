"""BM25 over texts held in memory: the scorer that needs no model.

A word is a run of Unicode letters, marks and digits, NFKC-normalised and case-folded. Plain words miss
three things, so: the parts of an identifier (`parseHTTPReply`, `max_tokens`) stand beside the whole, numbers
lose their thousands commas, and scripts written without spaces give characters and their pairs. A few
English endings are stripped, so that "movies" finds "movie" and "founding" finds "founded".

Okapi BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) with Lucene's idf, which
is never negative, scored ahead of the query by bm25s (https://arxiv.org/abs/2407.03618).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import bm25s

# Thai and Lao, Myanmar, Khmer, kana, Han
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs and accents are no \w in Python, but they are no word boundary either.
_MARKS = r"\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_RUN = re.compile(
    r"(?P<number>\d+(?:,\d{3})+(?!\w))"
    rf"|(?P<unspaced>[{_UNSPACED}]+)"
    rf"|(?P<word>(?:(?![{_UNSPACED}])[\w{_MARKS}])+)"
)
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+")
_ENGLISH = re.compile(r"[a-z]{4,}")


def terms(text: str) -> Iterator[str]:
    """Yield the index terms of a text in order, repeats included."""
    for match in _RUN.finditer(unicodedata.normalize("NFKC", text)):
        run = match.group()
        if match.lastgroup == "number":
            yield run.replace(",", "")
        elif match.lastgroup == "unspaced":
            yield from run
            yield from (first + second for first, second in zip(run, run[1:], strict=False))
        else:
            yield _stem(run.casefold())
            parts = _PART.findall(run)
            if len(parts) > 1:
                yield from (_stem(part.casefold()) for part in parts)


def grams(text: str, size: int = 4) -> Iterator[str]:
    """Yield the character n-grams of each word, its ends marked: terms that survive a typo or a suffix."""
    for match in _RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = f"_{match.group()}_"
        yield from (word[start : start + size] for start in range(max(1, len(word) - size + 1)))


def _stem(word: str) -> str:
    """Strip plural, -ed, -ing and a final e from an English word, as a term and never to be shown."""
    if not _ENGLISH.fullmatch(word):
        return word
    if word.endswith("ies"):
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            word = word.removesuffix(ending)
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if word.endswith("e") and len(word) > 4 else word


class Lexical:
    """An immutable index of texts, which it names by their position. `analyze` turns a text into terms."""

    def __init__(self, texts: Sequence[str], analyze: Callable[[str], Iterable[str]] = terms) -> None:
        self._analyze = analyze
        corpus = [list(analyze(text)) for text in texts]
        self._size = len(corpus)
        self._holding = Counter(term for found in corpus for term in set(found))  # texts per term
        self._index = bm25s.BM25(method="lucene")
        if self._holding:
            self._index.index(corpus, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """One BM25 score per text, 0.0 where no term is shared. A repeated query term counts once."""
        known = [term for term in dict.fromkeys(self._analyze(query)) if term in self._holding]
        if not known:
            return [0.0] * self._size
        return [float(score) for score in self._index.get_scores(known)]

    def top(self, query: str, k: int) -> list[int]:
        """Positions of the `k` best texts, best first; equal scores, zeros too, keep the texts' order."""
        scores = self.scores(query)
        return sorted(range(self._size), key=lambda position: -scores[position])[:k]

    def ceiling(self, query: str) -> float:
        """What no text's score for `query` can pass, 0.0 without terms: the idf of all its terms together.

        A score divided by it is the share of the query that a text covers, comparable between queries.
        """
        counts = [self._holding[term] for term in dict.fromkeys(self._analyze(query))]
        return sum(math.log1p((self._size - count + 0.5) / (count + 0.5)) for count in counts)
