"""A model on this machine as a LangChain chat model."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import run_in_executor
from pydantic import Field, PrivateAttr
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import out_of_memory, overflow
from agentctx.models.stops import StopFilter
from agentctx.models.template import ChatTemplate
from agentctx.models.tokenizer import Detokenizer
from agentctx.models.weights import Weights
from agentctx.runtime.context import Context
from agentctx.runtime.memory import is_out_of_memory
from agentctx.runtime.sampling import Sampling, generate
from agentctx.runtime.speculate import Speculation, draft_method
from agentctx.workflows.ports import SOURCES

DEFAULT_ANSWER = 512  # tokens, where the caller names no limit
_PER_CALL = frozenset({"temperature", "top_p", "max_tokens", "seed", "prefill", "exact"})


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: list[int]
    sources: tuple[str, ...]  # documents whose text it holds
    first: int  # the first token that such a text may have
    prefill: str
    most: int
    sampling: Sampling
    stop: tuple[str, ...]
    drafting: Speculation | None  # of an exact answer


class LocalChat(BaseChatModel):
    """Greedy by default, streaming, with exact usage; several calls at once take turns token by token.

    A prompt that leaves no room for `max_tokens` raises `ContextOverflow`; nothing is ever cut. With
    `prefill` the reply is made to begin with that text, which is part of what is returned. With `exact` a
    sparse attention method only drafts, and dense attention has the last word on every token: greedy answers
    only. `temperature`, `top_p`, `max_tokens`, `seed`, `prefill` and `exact` may also be given per call or
    through `bind`. What is kept of a prompt is listed under the documents that its messages name
    (`workflows.ports.SOURCES`).
    """

    weights: Weights = Field(exclude=True, repr=False)
    model_name: str
    context: int  # tokens, prompt and answer together
    max_tokens: int | None = None  # of the answer; None: up to 512, or what the window leaves
    temperature: float = 0.0
    top_p: float = 1.0
    stop: list[str] | None = None
    seed: int | None = None
    prefill: str = ""
    exact: bool = False
    _template: ChatTemplate = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Refuse a model without a chat template at once."""
        super().model_post_init(context)
        self._template = ChatTemplate(self.weights.tokenizer)
        if self.exact:
            draft_method(self.weights.engine.method)

    @property
    def template(self) -> ChatTemplate:
        """What turns messages into tokens; a counter over it counts exactly what is sent."""
        return self._template

    @property
    def _llm_type(self) -> str:
        return "agentctx-local"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model_name", "max_tokens", "temperature", "top_p", "stop", "seed", "prefill", "exact")
        return {"fingerprint": self.weights.fingerprint} | {name: getattr(self, name) for name in names}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._complete(self._request(messages, stop, kwargs), threading.Event())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        cancelled = threading.Event()
        try:
            request = await run_in_executor(None, self._request, messages, stop, kwargs)
            return await run_in_executor(None, self._complete, request, cancelled)
        finally:
            cancelled.set()

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from self._chunks(self._request(messages, stop, kwargs), threading.Event())

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        cancelled = threading.Event()
        try:
            request = await run_in_executor(None, self._request, messages, stop, kwargs)
            chunks = self._chunks(request, cancelled)
            while (chunk := await run_in_executor(None, next, chunks, None)) is not None:
                yield chunk
        finally:
            cancelled.set()

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> _Request:
        if unknown := sorted(options.keys() - _PER_CALL):
            raise ConfigError(
                f"a local model does not take {', '.join(unknown)}",
                hint=f"known: {', '.join(sorted(_PER_CALL))}",
            )
        chosen = {name: options.get(name, getattr(self, name)) for name in _PER_CALL}
        prompt = self._template.encode(messages, prefill=chosen["prefill"])
        left = self._room - len(prompt)
        most = chosen["max_tokens"]
        if most is None:
            most = min(DEFAULT_ANSWER, max(left, 1))
        if most < 1:
            raise ConfigError(f"an answer of {most} tokens cannot be generated")
        if most > left:
            raise overflow(len(prompt), most, self._room)
        sampling = Sampling(chosen["temperature"], chosen["top_p"], chosen["seed"])
        drafting = self._drafting(sampling) if chosen["exact"] else None
        sources = tuple(name for message in messages for name in message.additional_kwargs.get(SOURCES, ()))
        first = self._beginning(messages, prompt) if sources else 0
        stops = tuple(stop or self.stop or ())
        return _Request(prompt, sources, first, chosen["prefill"], most, sampling, stops, drafting)

    def _beginning(self, messages: list[BaseMessage], prompt: list[int]) -> int:
        """Tokens before the content of the first message that names documents."""
        at = next(at for at, message in enumerate(messages) if message.additional_kwargs.get(SOURCES))
        empty = self._template.encode([*messages[:at], messages[at].model_copy(update={"content": ""})])
        return next((n for n, pair in enumerate(zip(prompt, empty, strict=False)) if pair[0] != pair[1]), 0)

    @property
    def _room(self) -> int:
        """Tokens of prompt and answer: the window, unless the attention has no end and nobody lowered it."""
        endless = self.weights.engine.method.endless and self.context >= self.weights.context
        return sys.maxsize if endless else self.context

    def _drafting(self, sampling: Sampling) -> Speculation:
        if sampling.temperature > 0:
            raise ConfigError(
                f"exact answers are greedy: a temperature of {sampling.temperature} goes without them",
                hint="leave temperature or exact out",
            )
        return Speculation(draft_method(self.weights.engine.method))

    def _complete(self, request: _Request, cancelled: threading.Event) -> ChatResult:
        chunks = list(self._chunks(request, cancelled))
        last = chunks[-1].message
        message = AIMessage(
            content="".join(chunk.text for chunk in chunks),
            response_metadata=last.response_metadata,
            usage_metadata=last.usage_metadata if isinstance(last, AIMessageChunk) else None,
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(self, request: _Request, cancelled: threading.Event) -> Iterator[ChatGenerationChunk]:
        """Text as it comes, then one chunk without text that carries usage and the reason for ending."""
        if request.prefill:
            yield _text_chunk(request.prefill)
        try:
            context, hidden = self._begin(request.prompt, cancelled)
        except (MemoryError, RuntimeError) as error:
            raise self._explained(error) from error
        finally:  # what was read until then is kept
            self.weights.engine.name(request.prompt, request.sources, first=request.first)
        try:
            yield from self._answer(request, context, hidden, cancelled)
        except (MemoryError, RuntimeError) as error:
            raise self._explained(error) from error
        finally:
            context.close()

    def _begin(self, prompt: list[int], cancelled: threading.Event) -> tuple[Context, Tensor | None]:
        """Hold a prompt; returns it with the hidden state of its last token."""
        return self.weights.engine.begin(prompt, keep=True, cancelled=cancelled)

    def _answer(
        self, request: _Request, context: Context, hidden: Tensor | None, cancelled: threading.Event
    ) -> Iterator[ChatGenerationChunk]:
        decoder, text = Detokenizer(self.weights.tokenizer), StopFilter(request.stop)
        count, reason, reused = 0, "length", context.reused
        for token in self._tokens(request, context, hidden, cancelled):
            count += 1
            if token in self.weights.ends:
                reason = "stop"
                break
            if piece := text.feed(decoder.step(token)):
                yield _text_chunk(piece)
            if text.stopped:
                reason = "stop"
                break
        if rest := text.flush():
            yield _text_chunk(rest)
        yield self._last_chunk(request, context, reused, count, reason)

    def _tokens(
        self, request: _Request, context: Context, hidden: Tensor | None, cancelled: threading.Event
    ) -> Iterator[int]:
        most, ends = request.most, self.weights.ends
        if request.drafting:
            return request.drafting.generate(context, hidden, most=most, ends=ends, cancelled=cancelled)
        return generate(context, hidden, most=most, ends=ends, sampling=request.sampling, cancelled=cancelled)

    def _explained(self, error: Exception) -> Exception:
        return out_of_memory(self.weights.name) if is_out_of_memory(error) else error

    def _last_chunk(
        self, request: _Request, context: Context, reused: int, answer: int, reason: str
    ) -> ChatGenerationChunk:
        prompt, drafting, coverage = len(request.prompt), request.drafting, context.state.notes[0].coverage
        told: dict[str, Any] = {"warnings": context.warnings} if context.warnings else {}
        if drafting:
            told |= {"draft_tokens": drafting.draft_tokens, "accepted_tokens": drafting.accepted_tokens}
        elif coverage.rows:
            told["attention"] = coverage.told()
        message = AIMessageChunk(
            content="",
            response_metadata={"model_name": self.model_name, "finish_reason": reason, **told},
            usage_metadata={
                "input_tokens": prompt,
                "output_tokens": answer,
                "total_tokens": prompt + answer,
                "input_token_details": {"cache_read": reused},
            },
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)


def _text_chunk(text: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text))
