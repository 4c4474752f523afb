"""What a strategy may ask of the world besides LangChain's `BaseChatModel`.

A model without a `Reader` works everywhere; the strategies that need one say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

CALL = "agentctx_call"  # in a message's additional_kwargs: the role and the key of the call that sends it
SOURCES = "agentctx_sources"  # in a message's additional_kwargs: names of the documents whose text it holds
SpanMethod = Literal["attention", "focal", "likelihood", "entropy"]


@dataclass(frozen=True, slots=True)
class Scores:
    """One score per text, higher is more relevant, and the tokens that were computed to get them."""

    values: tuple[float, ...]
    computed_tokens: int
    reused_tokens: int  # tokens whose KV was already held
    warnings: tuple[str, ...] = ()  # what failed without changing a score


@dataclass(frozen=True, slots=True)
class SentenceScores:
    """For each text one score per sentence, in the order of `memory.sentences`; higher is more relevant."""

    values: tuple[tuple[float, ...], ...]
    computed_tokens: int
    reused_tokens: int
    warnings: tuple[str, ...] = ()


class Counter(Protocol):
    """Counts tokens as the model that will be called does."""

    exact: bool  # False: an estimate, and plans reserve a quarter more

    def count_text(self, text: str) -> int:
        """Tokens of the bare text."""
        ...

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens of the finished prompt, chat template and generation prompt included."""
        ...


class Reader(Protocol):
    """What only a local model runtime can do: look at text without generating."""

    async def likelihood(
        self, question: str, texts: Sequence[str], sources: Sequence[Sequence[str]] = ()
    ) -> Scores:
        """Mean log P(question token | text): how well each text predicts the question.

        `sources`, if given, names for each text the documents that hold it.

        The KV of each text is computed once in the life of the reader, within its memory budget.
        """
        ...

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        """The most tokens `likelihood` can compute for these arguments, without computing anything."""
        ...


class Embedder(Protocol):
    """A small model that puts texts of one meaning near one another, whatever their words."""

    async def similarities(self, question: str, texts: Sequence[str]) -> Scores:
        """The cosine of the question's vector with that of each text, from -1.0 to 1.0.

        The vector of each text is made once and kept. None of the tokens is the model's of the run.
        """
        ...


class KVIndex(Protocol):
    """Passages whose keys and values a local model has kept: found by their keys, and answered from without
    being read again. Passages are told apart by their text, so one that changed is another one.
    """

    passage_tokens: int  # documents were cut into passages of so many tokens at most

    @property
    def reader(self) -> Reader:
        """Gives likelihoods from what is kept."""
        ...

    def held(self, texts: Sequence[str]) -> list[bool]:
        """Which of these passages are in the index."""
        ...

    def nearest_cost(self, question: str) -> int:
        """The most tokens `nearest` can compute."""
        ...

    async def nearest(self, question: str, texts: Sequence[str], k: int) -> Scores:
        """How near the keys of each passage are to the question; minus infinity beyond the best `k`."""
        ...

    def composed(self, texts: Sequence[str]) -> BaseChatModel:
        """The model, taking these passages from what is kept wherever they stand in a prompt."""
        ...


class SpanReader(Reader, Protocol):
    """A Reader that also knows where in a text to look."""

    async def score_spans(
        self,
        question: str,
        texts: Sequence[str],
        sources: Sequence[Sequence[str]] = (),
        *,
        method: SpanMethod = "attention",
    ) -> SentenceScores:
        """How relevant each sentence of each text is; `sources` as in `likelihood`.

        "attention": what the question's rows attend to in the text, "focal": what the row after the beginning
        of an answer does; both are comparable within a text only. "likelihood" and "entropy" read each
        sentence by itself: how well it predicts the question, how sure the model is of the answer's beginning
        (nats below 0).
        """
        ...
