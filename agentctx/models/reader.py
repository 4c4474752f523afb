"""The `Reader` of a local model: how well does each text predict the question?

A text is a good place to look when the question reads like something one would ask of it. So each text is
put before the question and the model gives the mean log-probability of the question's tokens: query
likelihood (Ponte and Croft, 1998; with a pretrained model, Sachan et al., "Improving Passage Retrieval with
Zero-Shot Question Generation", 2022). A model of 135M parameters ranks well this way, long before it can
say "yes" or "no" reliably, since nothing is generated.

The keys and values of a text do not depend on the question. The engine computes them once and keeps them, in
memory and on disk, so a second question costs its own tokens per text and no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.memory.errors import InputError, ModelError
from agentctx.memory.kv.dtype import Keep
from agentctx.memory.offsets import Offsets
from agentctx.memory.sentences import sentences
from agentctx.models.calibration import Calibration
from agentctx.models.tokenizer import Tokenizer
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.retrieve.heads import heads_of
from agentctx.runtime.retrieve.mass import attended
from agentctx.runtime.retrieve.spans import smoothed, worth
from agentctx.workflows.ports import Scores, SentenceScores, SpanMethod

# Between a text and the question. The best of four wordings on the 100 development questions of
# benchmarks/finding.py: of 25 candidates the right one came first for 94, after "Question:" for 90.
_AFTER = "\n\nThis text answers the question:"
_HINT = "\nThe answer is"  # after a question, before what is looked at by the row behind it
UNCALIBRATED = (
    "the model is not calibrated: all heads of its middle layers are looked at (run `agentctx calibrate`)"
)
Found = TypeVar("Found")
_BATCH_TOKENS = 4096  # tokens of text that one forward pass attends to; bounds its memory
_LOGIT_ROWS = 1024  # question tokens that one pass gives logits for; bounds it too


class LikelihoodReader:
    """Scores texts with a local model. Implements `SpanReader`.

    Scores are natural logarithms per token, at most 0.0; in bfloat16 they may differ by about 0.05 with the
    company a text is scored in.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        calibration: Calibration | None = None,
        *,
        before: Sequence[int] = (),
        keep: Keep = True,
    ) -> None:
        """`calibration`: which heads are looked at where spans are scored by attention. `before`: tokens that
        every text stands behind, instead of what a sequence opens with.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._calibration = calibration
        self._before = list(before) or tokenizer.opening
        self._keep: Keep = keep

    async def likelihood(
        self, question: str, texts: Sequence[str], sources: Sequence[Sequence[str]] = ()
    ) -> Scores:
        """Mean log P(question token | text) for each text, without blocking the event loop.

        What is kept of each text is listed under its `sources`, documents by name.
        Raises `InputError` (empty) for a blank question and `ModelError` (overflow) if a text and the
        question do not fit the model's window together.
        """
        return await _aside(partial(self.scores, question, texts, sources))

    async def score_spans(
        self,
        question: str,
        texts: Sequence[str],
        sources: Sequence[Sequence[str]] = (),
        *,
        method: SpanMethod = "attention",
    ) -> SentenceScores:
        """See `SpanReader`. A model that was not calibrated looks through all heads of its middle layers, and
        says so in `warnings`. Raises what `likelihood` does; ModelError (unsupported) for attention of a
        model whose layers all have windows.
        """
        if method in ("attention", "focal"):
            return await _aside(partial(self._attention, question, texts, sources, method == "focal"))
        cut = [sentences(text) for text in texts]
        pieces = [text[a:b] for text, spans in zip(texts, cut, strict=True) for a, b in spans]
        named = [documents for documents, spans in zip(sources, cut, strict=False) for _ in spans]
        found = await _aside(partial(self.scores, question, pieces, named, entropy=method == "entropy"))
        each = iter(found.values)
        values = tuple(tuple(islice(each, len(spans))) for spans in cut)
        return SentenceScores(values, found.computed_tokens, found.reused_tokens, found.warnings)

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        """The most tokens `likelihood` can compute for these arguments; held texts are not deducted."""
        contexts = self._contexts(texts)
        asked = len(self._question(question))
        return sum(len(ids) - 1 + asked for ids in contexts.values())

    def held_as(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens that are read, and kept, for each text."""
        return {text: ids[:-1] for text, ids in self._contexts(texts).items()}

    def scores(
        self,
        question: str,
        texts: Sequence[str],
        sources: Sequence[Sequence[str]] = (),
        *,
        entropy: bool = False,
        abandoned: threading.Event | None = None,
    ) -> Scores:
        """What `likelihood` gives, in this thread; with `entropy`, how sure the model is, after text and
        question, of how an answer begins: the entropy of that token, in nats below 0.
        """
        asked = self._question(question) + (self._tokenizer.encode(_HINT) if entropy else [])
        contexts = self._contexts(texts)
        values: dict[str, float] = {}
        tally = _Tally()
        fed = len(asked) + entropy  # a likelihood needs no row behind its last token
        for batch, held in self._held(contexts, fed, tally, abandoned, _owners(texts, sources)):
            last = [[contexts[text][-1], *asked] for text in batch]
            found = self._entropies(held, last) if entropy else self._ask(held, last)
            values.update(zip(batch, found, strict=True))
            tally.computed += fed * len(batch)
        every = tuple(values[text] for text in texts if text in values)  # all, unless abandoned
        return Scores(every, tally.computed, tally.reused, tuple(tally.warnings))

    def _attention(
        self,
        question: str,
        texts: Sequence[str],
        sources: Sequence[Sequence[str]],
        focal: bool,
        *,
        abandoned: threading.Event | None = None,
    ) -> SentenceScores:
        asked = self._question(question)
        rows, hint = (1, self._tokenizer.encode(_HINT)) if focal else (len(asked), [])
        contexts = self._contexts(texts)
        values: dict[str, tuple[float, ...]] = {}
        tally = _Tally()
        picked = self._calibration.heads if self._calibration else None
        if picked is None:
            tally.warnings.append(UNCALIBRATED)
        fed = 1 + len(asked) + len(hint)
        for batch, held in self._held(contexts, fed, tally, abandoned, _owners(texts, sources)):
            heads = heads_of(self._engine, picked)
            # They end alike, so that the last token of what was read is the same row for all.
            last, opening = contexts[batch[0]][-1], len(self._before)
            mass = attended(held, [last, *asked, *hint], rows=rows, heads=heads)
            mass = mass - attended(held, [last, *hint], rows=1, heads=heads)
            for text, row in zip(batch, mass, strict=True):
                values[text] = self._sentences(text, row, opening)
            tally.computed += (fed + 1 + len(hint)) * len(batch)
        found = tuple(values[text] for text in texts if text in values)
        return SentenceScores(found, tally.computed, tally.reused, tuple(tally.warnings))

    def _sentences(self, text: str, mass: Tensor, first: int) -> tuple[float, ...]:
        """The worth of each sentence of a text whose tokens begin at `first`."""
        offsets = Offsets(self._tokenizer.backend.encode(text, add_special_tokens=False).offsets, len(text))
        spans = [offsets.tokens(start, end) for start, end in sentences(text)]
        own = mass[first : first + len(offsets)]
        return tuple(worth(smoothed(own, [range(len(own))]), spans).tolist())

    def _held(
        self,
        contexts: dict[str, list[int]],
        fed: int,
        tally: _Tally,
        abandoned: threading.Event | None,
        owners: Mapping[str, Collection[str]],
    ) -> Iterator[tuple[list[str], list[Context]]]:
        """Texts in batches, each with what was read of it, up to its last token; `fed` come after that."""
        window = self._engine.window
        for text, ids in contexts.items():
            if len(ids) - 1 + fed > window:
                raise ModelError(
                    f"a text of {len(ids) - 1} tokens and a question of {fed} exceed the model's window "
                    f"of {window}: {text[:60]!r}…",
                    code="overflow",
                    hint="split the text into shorter passages",
                )
        for batch in _batches(contexts, fed):
            try:
                held = self._engine.read_all(
                    [contexts[text][:-1] for text in batch], keep=self._keep, cancelled=abandoned
                )
            finally:  # what was read until then is kept
                for text in batch:
                    ids, named = contexts[text][:-1], owners.get(text, ())
                    self._engine.name(ids, named, self._keep, first=len(self._before))
            try:
                if abandoned is not None and abandoned.is_set():
                    return
                tally.add(held)
                yield batch, held
            finally:
                for context in held:
                    context.close()

    def _question(self, question: str) -> list[int]:
        if not question.strip():
            raise InputError("the question is empty", code="empty", hint="ask something")
        return self._tokenizer.encode(f" {question.strip()}")

    def _contexts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens that stand before the question, per distinct text."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        opening, after = self._before, self._tokenizer.encode(_AFTER)
        encoded = self._tokenizer.encode_all(distinct)
        return {text: [*opening, *ids, *after] for text, ids in zip(distinct, encoded, strict=True)}

    def _ask(self, held: Sequence[Context], last: Sequence[Sequence[int]]) -> list[float]:
        """Mean log-probability of `last[i][1:]` after text i and `last[i][0]`; the contexts go on with
        them.
        """
        tokens = torch.tensor(last)
        hidden = self._engine.step(held, tokens[:, :-1])
        targets = tokens[:, 1:].to(hidden.device)
        return [  # a row at a time, as in float32 they would be large together
            -float(F.cross_entropy(self._engine.logits(row), target))
            for row, target in zip(hidden, targets, strict=True)
        ]

    def _entropies(self, held: Sequence[Context], last: Sequence[Sequence[int]]) -> list[float]:
        hidden = self._engine.step(held, torch.tensor(last))[:, -1]
        logs = self._engine.logits(hidden).log_softmax(-1)
        found: list[float] = (logs.exp() * logs).sum(-1).tolist()
        return found


@dataclass
class _Tally:
    """What a call took."""

    computed: int = 0
    reused: int = 0
    warnings: list[str] = field(default_factory=list)

    def add(self, held: Sequence[Context]) -> None:
        self.computed += sum(context.computed for context in held)
        self.reused += sum(context.reused for context in held)
        self.warnings += [warning for context in held for warning in context.warnings]


async def _aside(work: Callable[..., Found]) -> Found:
    """Do it in a thread, told by `abandoned=` when nobody waits for it any more."""
    abandoned = threading.Event()
    try:
        return await asyncio.to_thread(work, abandoned=abandoned)
    except asyncio.CancelledError:
        abandoned.set()  # the thread ends after the batch in hand
        raise


def _owners(texts: Sequence[str], sources: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """The documents that hold each text."""
    found: dict[str, set[str]] = {}
    for text, documents in zip(texts, sources, strict=False):
        found.setdefault(text, set()).update(documents)
    return found


def _batches(contexts: dict[str, list[int]], asked: int) -> Iterator[list[str]]:
    """Texts of similar length together, so that little is padding."""
    batch: list[str] = []
    for text in sorted(contexts, key=lambda text: len(contexts[text])):
        rows = len(batch) + 1
        full = rows * (len(contexts[text]) + asked) > _BATCH_TOKENS or rows * asked > _LOGIT_ROWS
        if batch and full:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
