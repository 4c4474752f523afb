"""Which spans of a reading a question is about.

Attention: what the rows of the question attend to, through the heads that calibrating chose, less what the
row attends to that would begin an answer to nothing. That takes away what is looked at whatever is asked. By
one row (after the beginning of an answer), by all rows of the question, or by those of a reply. After
InfiniRetri (arXiv 2502.12962) and AttentionRAG (arXiv 2503.10720), which look through other layers. Entropy:
after XL3M (arXiv 2405.17755), which prefers segments after which the model is sure; what exactly is measured
is ours, see `models.reader`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from agentctx.kernels.mass import span_sums
from agentctx.memory.errors import ConfigError
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Document, Span
from agentctx.models.reader import UNCALIBRATED
from agentctx.reading.records import Reply
from agentctx.reading.request import Place
from agentctx.reading.texts import Text
from agentctx.runtime.retrieve.heads import heads_of
from agentctx.runtime.retrieve.spans import smoothed, worth

if TYPE_CHECKING:
    from agentctx.reading.reading import Reading

Method = Literal["auto", "likelihood", "attention", "focal", "entropy"]
HINT = "The answer is"  # after a question, before the row that looks
CHUNK = 256  # tokens of neighbouring spans, at most, where chunks are scored first
CHUNKS = 4  # of those, in which spans are looked for


@dataclass(frozen=True, slots=True)
class SpanScore:
    """`score`: higher is more relevant; comparable within one call only. `mass`: the share of the rows'
    attention that the span gets, mean of the heads that were looked through; 0.0 where nobody looked.
    """

    span: Span
    score: float
    mass: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A span, its characters, and its tokens in the reading as far as they are held."""

    span: Span
    text: str
    tokens: range


@dataclass(frozen=True, slots=True)
class Look:
    """By the rows of what attention is looked at, with what an empty question gets taken away or not; the
    `hint` is for the one row of "focal".
    """

    rows: Literal["question"] | Reply = "question"
    calibrate: bool = True
    hint: str = HINT


def score_spans(
    reading: Reading, question: str, spans: Sequence[Place] | None, method: Method, look: Look
) -> list[SpanScore]:
    """See `Reading.score_spans`."""
    if not question.strip():
        raise ConfigError("the question is empty")
    found = _candidates(reading, spans)
    scores = mass = [0.0] * len(found)
    if method in ("likelihood", "entropy"):
        texts = [one.text for one in found]
        sources = _sources(reading, found)
        told = reading.engine.reader.scores(question, texts, sources, entropy=method == "entropy")
        scores = list(told.values)
    elif found:
        scores, mass = _by_attention(reading, question, found, look, focal=method == "focal")
    if method == "auto":
        scores = _in_best_chunks(reading, question, found, scores)
    scored = [SpanScore(one.span, *pair) for one, *pair in zip(found, scores, mass, strict=True)]
    return sorted(scored, key=lambda one: -one.score)


def _candidates(reading: Reading, spans: Sequence[Place] | None) -> list[_Candidate]:
    """The spans, or the sentences of which something is held."""
    texts, held = reading.texts, reading.held
    documents = {text.document.id: text.document for text in texts if text.document}
    if len(documents) < len({text.document and text.document.id for text in texts}):
        raise ConfigError("what was read as token ids has no spans", hint="read the text itself")
    if spans is not None:
        named = [place if isinstance(place, Span) else _only(documents, place) for place in spans]
    else:
        named = [Span(key, *pair) for key, one in documents.items() for pair in sentences(one.text)]
    found = []
    for span in named:
        tokens = _tokens(texts, span, held)
        if spans is None and not bool(held[tokens.start : tokens.stop].any()):
            continue
        found.append(_Candidate(span, documents[span.document_id].text[span.start : span.end], tokens))
    return found


def _by_attention(
    reading: Reading, question: str, found: Sequence[_Candidate], look: Look, *, focal: bool
) -> tuple[list[float], list[float]]:
    """Score and mass of each candidate."""
    heads = _heads(reading)
    tail = reading.engine.tokens.data(look.hint).ids if focal else []
    asked, rows = _rows(reading, question, look)
    mass = reading.look([*asked, *tail], rows=1 if focal else rows, heads=heads)
    rest = mass
    if look.calibrate:
        empty = reading.frame.question(reading.engine.tokens, "")
        rest = mass - reading.look([*empty, *tail], rows=1, heads=heads)
    ranges = [one.tokens for one in found]
    places = [range(text.first, min(text.first + len(text.offsets), len(mass))) for text in reading.texts]
    pairs = torch.tensor([(one.start, one.stop) for one in ranges], dtype=torch.int32, device=mass.device)
    return worth(smoothed(rest, places), ranges).tolist(), span_sums(mass[None], pairs)[0].tolist()


def _in_best_chunks(
    reading: Reading, question: str, found: Sequence[_Candidate], scores: Sequence[float]
) -> list[float]:
    """The scores of spans in the chunks that predict the question best; minus infinity elsewhere."""
    chunks = list(_chunks(found))
    if len(chunks) <= CHUNKS:
        return list(scores)
    documents = {text.document.id: text.document.text for text in reading.texts if text.document}
    texts = [
        documents[found[one.start].span.document_id][found[one.start].span.start : found[one[-1]].span.end]
        for one in chunks
    ]
    sources = _sources(reading, [found[one.start] for one in chunks])
    values = reading.engine.reader.scores(question, texts, sources).values
    best = sorted(range(len(chunks)), key=lambda index: -values[index])[:CHUNKS]
    kept = {index for one in best for index in chunks[one]}
    return [score if index in kept else -math.inf for index, score in enumerate(scores)]


def _heads(reading: Reading) -> Tensor:
    """The weights of the heads that calibrating chose; a warning where nobody calibrated."""
    runtime, known = reading.engine.runtime, reading.engine.weights.calibration
    if known is None:
        warnings.warn(UNCALIBRATED, stacklevel=5)
    return heads_of(runtime, known.heads if known else None)


def _rows(reading: Reading, question: str, look: Look) -> tuple[list[int], int]:
    """What is fed after the text, and how many of its last rows look."""
    tokens, frame = reading.engine.tokens, reading.frame
    asked = frame.question(tokens, question)
    if isinstance(look.rows, Reply):
        if not look.rows.token_ids:
            raise ConfigError("an empty reply has no rows to look with")
        return [*asked, *look.rows.token_ids], len(look.rows.token_ids)
    return asked, max(1, len(asked) - len(tokens.data(frame.between).ids))


def _chunks(found: Sequence[_Candidate]) -> Iterator[range]:
    """Neighbours in order, of one document, up to `CHUNK` tokens: as indices of candidates."""
    start = 0
    for index in range(1, len(found) + 1):
        if index < len(found):
            first, one, before = found[start], found[index], found[index - 1]
            follows = one.span.document_id == first.span.document_id and one.span.start >= before.span.end
            if follows and one.tokens.stop - first.tokens.start <= CHUNK:
                continue
        yield range(start, index)
        start = index


def _sources(reading: Reading, found: Sequence[_Candidate]) -> list[tuple[str]]:
    """Whose text each span is."""
    named = {text.document.id: text.document.source for text in reading.texts if text.document}
    return [(named[one.span.document_id],) for one in found]


def _tokens(texts: Sequence[Text], span: Span, held: Tensor) -> range:
    """Where most of the span is held: a composed reading may have a document twice, in parts."""
    found = []
    for text in texts:
        if text.document and text.document.id == span.document_id:
            tokens = text.tokens(span.start, span.end)
            found.append(range(min(tokens.start, len(held)), min(tokens.stop, len(held))))
    if not found:
        raise ConfigError(f"no text of this reading has the id {span.document_id[:12]}…: {span}")
    return max(found, key=lambda tokens: int(held[tokens.start : tokens.stop].sum()))


def _only(documents: Mapping[str, Document], pair: tuple[int, int]) -> Span:
    if len(documents) > 1:
        raise ConfigError(f"characters {pair} of which of {len(documents)} texts?", hint="give a Span")
    return Span(next(iter(documents)), *pair)
