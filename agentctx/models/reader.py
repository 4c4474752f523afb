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
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from agentctx.memory.errors import InputError, ModelError
from agentctx.memory.kv.dtype import Keep
from agentctx.models.tokenizer import Tokenizer
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.workflows.ports import Scores

# Between a text and the question. The best of four wordings on the 100 development questions of
# benchmarks/finding.py: of 25 candidates the right one came first for 94, after "Question:" for 90.
_AFTER = "\n\nThis text answers the question:"
_BATCH_TOKENS = 4096  # tokens of text that one forward pass attends to; bounds its memory
_LOGIT_ROWS = 1024  # question tokens that one pass gives logits for; bounds it too


class LikelihoodReader:
    """Scores texts with a local model. Implements `Reader`.

    Scores are natural logarithms per token, at most 0.0; in bfloat16 they may differ by about 0.05 with the
    company a text is scored in.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, before: Sequence[int] = (), keep: Keep = True
    ) -> None:
        """`before`: tokens that every text stands behind, instead of what a sequence opens with."""
        self._engine = engine
        self._tokenizer = tokenizer
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
        abandoned = threading.Event()
        try:
            return await asyncio.to_thread(self._likelihood, question, texts, sources, abandoned)
        except asyncio.CancelledError:
            abandoned.set()  # the thread ends after the batch in hand
            raise

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        """The most tokens `likelihood` can compute for these arguments; held texts are not deducted."""
        contexts = self._contexts(texts)
        asked = len(self._question(question))
        return sum(len(ids) - 1 + asked for ids in contexts.values())

    def held_as(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens that are read, and kept, for each text."""
        return {text: ids[:-1] for text, ids in self._contexts(texts).items()}

    def _likelihood(
        self,
        question: str,
        texts: Sequence[str],
        sources: Sequence[Sequence[str]],
        abandoned: threading.Event,
    ) -> Scores:
        asked = self._question(question)
        contexts = self._contexts(texts)
        window = self._engine.window
        for text, ids in contexts.items():
            if len(ids) - 1 + len(asked) > window:
                raise ModelError(
                    f"a text of {len(ids)} tokens and a question of {len(asked)} exceed the model's window "
                    f"of {window}: {text[:60]!r}…",
                    code="overflow",
                    hint="split the text into shorter passages",
                )
        values: dict[str, float] = {}
        warnings: list[str] = []
        computed = reused = 0
        for batch in _batches(contexts, len(asked)):
            held = self._engine.read_all(
                [contexts[text][:-1] for text in batch], keep=self._keep, cancelled=abandoned
            )
            try:
                if abandoned.is_set():
                    return Scores((), computed, reused)
                last = [[contexts[text][-1], *asked] for text in batch]
                values.update(zip(batch, self._ask(held, last), strict=True))
                computed += sum(context.computed for context in held) + len(asked) * len(batch)
                reused += sum(context.reused for context in held)
                warnings += [warning for context in held for warning in context.warnings]
            finally:
                for context in held:
                    context.close()
        for text, documents in zip(texts, sources, strict=False):
            self._engine.name(contexts[text][:-1], documents, self._keep)
        return Scores(tuple(values[text] for text in texts), computed, reused, tuple(warnings))

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
