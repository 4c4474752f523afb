"""The `Reader` of a local model: how well does each text predict the question?

A text is a good place to look when the question reads like something one would ask of it. So each text is
put before the question and the model gives the mean log-probability of the question's tokens: query
likelihood (Ponte and Croft, 1998; with a pretrained model, Sachan et al., "Improving Passage Retrieval with
Zero-Shot Question Generation", 2022). A model of 135M parameters ranks well this way, long before it can
say "yes" or "no" reliably, since nothing is generated.

The keys and values of a text do not depend on the question. They are computed once and kept, the least
recently used leaving first, so a second question costs its own tokens per text and no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from agentctx.memory.errors import InputError, ModelError
from agentctx.workflows.ports import Scores

# Between a text and the question. The best of four wordings on the 100 development questions of
# benchmarks/finding.py: of 25 candidates the right one came first for 94, after "Question:" for 90.
_AFTER = "\n\nThis text answers the question:"
_BATCH_TOKENS = 4096  # padded tokens of text that one forward pass attends to; bounds its memory
_LOGIT_ROWS = 1024  # question tokens that one pass gives logits for; bounds it too


@dataclass(frozen=True, slots=True)
class _Kept:
    """The keys and values of one text, a pair per layer, each of shape (heads, tokens, width)."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


class TransformersReader:
    """Scores texts with a causal language model of transformers. Implements `Reader`.

    `lock` guards the model, which chat calls share; it is taken for one batch at a time. `kv_bytes` bounds
    what is kept between calls. Scores are natural logarithms per token, at most 0.0; in bfloat16 they may
    differ by about 0.05 with the company a text is scored in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lock: threading.Lock,
        kv_bytes: int = 1 << 30,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._lock = lock
        self._kv_bytes = kv_bytes
        self._window: int = model.config.get_text_config().max_position_embeddings
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of keys and values held now, never more than `kv_bytes` between two calls."""
        return self._kept_bytes

    async def likelihood(self, question: str, texts: Sequence[str]) -> Scores:
        """Mean log P(question token | text) for each text, without blocking the event loop.

        Raises `InputError` (empty) for a blank question and `ModelError` (overflow) if a text and the
        question do not fit the model's window together.
        """
        abandoned = threading.Event()
        try:
            return await asyncio.to_thread(self._likelihood, question, texts, abandoned)
        except asyncio.CancelledError:
            abandoned.set()  # the thread ends after the batch in hand
            raise

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        """The most tokens `likelihood` can compute for these arguments; held texts are not deducted."""
        contexts = self._contexts(texts)
        asked = len(self._question(question))
        return sum(len(ids) - 1 + asked for ids in contexts.values())

    def _likelihood(self, question: str, texts: Sequence[str], abandoned: threading.Event) -> Scores:
        asked = self._question(question)
        contexts = self._contexts(texts)
        for text, ids in contexts.items():
            if len(ids) - 1 + len(asked) > self._window:
                raise ModelError(
                    f"a text of {len(ids)} tokens and a question of {len(asked)} exceed the model's window "
                    f"of {self._window}: {text[:60]!r}…",
                    code="overflow",
                    hint="split the text into shorter passages",
                )
        values: dict[str, float] = {}
        computed = reused = 0
        for batch in _batches(contexts, len(asked)):
            if abandoned.is_set():
                return Scores((), computed, reused)
            with self._lock, torch.inference_mode():
                missing = [text for text in batch if text not in self._kept]
                held = {text: self._kept[text] for text in batch if text in self._kept}
                fresh = self._read({text: contexts[text] for text in missing})
                last = torch.tensor([[contexts[text][-1], *asked] for text in batch])
                means = self._ask([held.get(text) or fresh[text] for text in batch], last)
                self._keep(held | fresh)
            values.update(zip(batch, means, strict=True))
            computed += sum(kept.tokens for kept in fresh.values()) + len(asked) * len(batch)
            reused += sum(kept.tokens for kept in held.values())
        return Scores(tuple(values[text] for text in texts), computed, reused)

    def _question(self, question: str) -> list[int]:
        if not question.strip():
            raise InputError("the question is empty", code="empty", hint="ask something")
        return self._encode(f" {question.strip()}")

    def _contexts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens that stand before the question, per distinct text."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        before = self._tokenizer("x").input_ids  # whatever the tokenizer opens a sequence with
        opening = before[: before.index(self._encode("x")[0])]
        after = self._encode(_AFTER)
        encoded = self._tokenizer(distinct, add_special_tokens=False).input_ids
        return {text: [*opening, *ids, *after] for text, ids in zip(distinct, encoded, strict=True)}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _read(self, contexts: dict[str, list[int]]) -> dict[str, _Kept]:
        """Compute the keys and values of some texts: all tokens but the last, which asks the question.

        Padding on the right needs no mask: in a causal model nothing before it can see it.
        """
        if not contexts:
            return {}
        lengths = [len(ids) - 1 for ids in contexts.values()]
        padded = torch.zeros(len(contexts), max(lengths), dtype=torch.long)
        for row, (ids, length) in enumerate(zip(contexts.values(), lengths, strict=True)):
            padded[row, :length] = torch.tensor(ids[:-1])
        cache = DynamicCache()
        self._model.base_model(input_ids=padded.to(self._model.device), past_key_values=cache, use_cache=True)
        pairs = [_pair(layer) for layer in cache.layers]
        return {
            text: _Kept(tuple((k[row, :, :length].clone(), v[row, :, :length].clone()) for k, v in pairs))
            for row, (text, length) in enumerate(zip(contexts, lengths, strict=True))
        }

    def _ask(self, kept: Sequence[_Kept], last: Tensor) -> list[float]:
        """Mean log-probability of `last[:, 1:]`, one row per text, after that text and `last[:, 0]`.

        Padding stands on the left and is masked; positions count the text's own tokens.
        """
        device = self._model.device
        longest = max(text.tokens for text in kept)
        width = last.shape[1] - 1
        cache = DynamicCache()
        for layer in range(len(kept[0].layers)):
            keys, values = (
                torch.stack([F.pad(text.layers[layer][i], (0, 0, longest - text.tokens, 0)) for text in kept])
                for i in (0, 1)
            )
            cache.update(keys, values, layer)
        lengths = torch.tensor([text.tokens for text in kept], device=device)
        columns = torch.arange(longest + width, device=device)
        logits = self._model(
            input_ids=last[:, :-1].to(device),
            past_key_values=cache,
            attention_mask=(columns >= (longest - lengths)[:, None]).long(),
            position_ids=lengths[:, None] + torch.arange(width, device=device),
        ).logits
        targets = last[:, 1:].to(device)
        return [  # a row at a time, as in float32 they would be large together
            -float(F.cross_entropy(row.float(), target)) for row, target in zip(logits, targets, strict=True)
        ]

    def _keep(self, texts: dict[str, _Kept]) -> None:
        for text, kept in texts.items():
            if text not in self._kept:
                self._kept[text] = kept
                self._kept_bytes += kept.nbytes
            self._kept.move_to_end(text)
        while self._kept_bytes > self._kv_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes


def _pair(layer: object) -> tuple[Tensor, Tensor]:
    """The keys and values that one layer of a cache holds, batch first."""
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise ModelError(
            f"a layer of this model keeps {type(layer).__name__}, not keys and values for each token",
            hint="choose a model with attention in all layers, or rank without a reader",
        )
    return layer.keys, layer.values


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
