"""Models behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`, hosted.

One chat class over langchain-openai's. It raises our ModelError for everything that can go wrong on the way,
so the floors above know one tree of errors. It never retries: only the caller knows the budget. It notices
two failures that servers report as success: a cut prompt, and a stream that ends before the reply does.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Notice
from agentctx.models.counters import EstimateCounter, least_tokens
from agentctx.models.endpoint_errors import CLIENT_ERRORS, as_model_error
from agentctx.models.endpoint_transport import NO_PROXY, direct_client, lanes_client
from agentctx.models.load import Model
from agentctx.models.weights import LOADER
from agentctx.secret import without_login
from agentctx.workflows.profile import ModelProfile

URL = "AGENTCTX_BASE_URL"
KEYS = ("AGENTCTX_API_KEY", "OPENAI_API_KEY")
CONCURRENCY = 8  # calls in flight, unless the user says otherwise
DEFAULT_WINDOW = 8192  # tokens, where neither the user nor the endpoint says
TIMEOUT = 300.0  # seconds without a byte
_PLAIN = frozenset({"model", "messages", "max_tokens", "temperature", "stream", "stop"})  # of a payload
_PROBE_TIMEOUT = 10.0  # seconds to ask for the window
_WINDOW_FIELDS = ("max_model_len", "loaded_context_length", "context_length", "context_window", "n_ctx")
_JUDGED_FROM = 256  # words; below, a template could outweigh the text
_TRUNCATED_BELOW = 0.8


class EndpointChat(ChatOpenAI):
    """`ChatOpenAI` whose failures are ModelErrors. Make it with `endpoint_chat`."""

    @property
    def place(self) -> str:
        """The endpoint as it may be shown: credentials in the URL are left out."""
        url = urlsplit(self.openai_api_base or "https://api.openai.com/v1")
        return f"{url.scheme}://{url.hostname}{f':{url.port}' if url.port else ''}{url.path}"

    @property
    def secret(self) -> str:
        """The key that is sent."""
        return self.openai_api_key.get_secret_value() if isinstance(self.openai_api_key, SecretStr) else ""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """A stored copy would lose the checks of this class."""
        return False

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Call the limit `max_tokens`, unless it is OpenAI itself: several servers ignore the newer name."""
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        if self.openai_api_base and "max_completion_tokens" in payload:
            payload["max_tokens"] = payload.pop("max_completion_tokens")
        return payload

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self.translated():
            return self._checked(messages, super()._generate(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self.translated():
            payload = self._get_request_payload(messages, stop=stop, **kwargs)
            if payload.keys() - _PLAIN:
                return self._checked(
                    messages, await super()._agenerate(messages, stop, run_manager, **kwargs)
                )
            # Without the client's typed models, which take more time than all the rest of a short call.
            body = await self.root_async_client.post("/chat/completions", body=payload, cast_to=object)
            if not isinstance(body, dict):
                raise ModelError(f"{self.place} answered with something else than JSON", code="malformed")
            return self._checked(messages, self._create_chat_result(body))

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        watch = _StreamWatch(self, kwargs.get("messages") or args[0])
        with self.translated():
            for chunk in super()._stream(*args, **kwargs):
                watch.see(chunk)
                yield chunk
            watch.end()

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        watch = _StreamWatch(self, kwargs.get("messages") or args[0])
        with self.translated():
            async for chunk in super()._astream(*args, **kwargs):
                watch.see(chunk)
                yield chunk
            watch.end()

    def _checked(self, messages: Sequence[BaseMessage], result: ChatResult) -> ChatResult:
        if not result.generations:
            raise ModelError(f"{self.place} answered without a choice", code="malformed")
        message = result.generations[0].message
        if isinstance(message, AIMessage) and message.usage_metadata:
            self.check_prompt(messages, message.usage_metadata["input_tokens"])
        return result

    def check_prompt(self, messages: Sequence[BaseMessage], reported: int) -> None:
        """ModelError `truncated_by_endpoint` if the endpoint read clearly less than it was sent.

        We lack its tokenizer, and an estimate that is too high would accuse honest servers. So the reported
        count is held against a floor that real tokenizers stay above: one token per word. English has about
        1.3, so a prompt cut to 60 % or less is noticed, a lighter cut is not.
        """
        least = least_tokens(messages)
        if 0 < reported < _TRUNCATED_BELOW * least and least >= _JUDGED_FROM:
            raise ModelError(
                f"{self.place} cut the prompt in silence: it read {reported} of at least {least} tokens",
                code="truncated_by_endpoint",
                hint="raise the server's own window (Ollama: OLLAMA_CONTEXT_LENGTH) or lower `window`",
            )

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise the ModelError for whatever the client libraries raise inside."""
        try:
            yield
        except ModelError:
            raise
        except CLIENT_ERRORS as error:
            cause = None if self.secret in str(error) else error  # a traceback would print it
            raise as_model_error(error, place=self.place, secret=self.secret) from cause


class _StreamWatch:
    """What must be true of a stream by its end."""

    def __init__(self, chat: EndpointChat, messages: Sequence[BaseMessage]) -> None:
        self._chat = chat
        self._messages = messages
        self._finished = False
        self._reported = 0

    def see(self, chunk: ChatGenerationChunk) -> None:
        if (chunk.generation_info or {}).get("finish_reason"):
            self._finished = True
        usage = getattr(chunk.message, "usage_metadata", None)
        if usage:
            self._reported = max(self._reported, usage["input_tokens"])

    def end(self) -> None:
        if not self._finished:
            raise ModelError(f"{self._chat.place} ended the stream before the reply was finished")
        self._chat.check_prompt(self._messages, self._reported)


def endpoint_chat(
    name: str, *, base_url: str | None = None, timeout: float = TIMEOUT, concurrency: int = CONCURRENCY
) -> EndpointChat:
    """The chat model `name` at `base_url`, greedy unless a call says otherwise; `timeout` in seconds.

    `concurrency`: calls that will be in flight at a time; more are served too.

    The key is the first of AGENTCTX_API_KEY and OPENAI_API_KEY that is set; a server that wants none gets a
    placeholder. A login is taken from `base_url` or, since runs are kept without, from AGENTCTX_BASE_URL if
    that is the same place. Without a URL it is OpenAI's, which needs a key (ConfigError).
    """
    key = next((os.environ[variable] for variable in KEYS if os.environ.get(variable)), "")
    if not key and base_url is None:
        raise ConfigError(
            f"the endpoint of {name!r} is not known",
            hint=f"give a base URL, or set {KEYS[0]} to use OpenAI's",
        )
    if base_url is not None:
        base_url = _checked_url(base_url)
    direct = base_url is not None and _is_loopback(base_url)
    return EndpointChat(
        http_client=direct_client(base_url) if base_url and direct else None,
        http_async_client=lanes_client(base_url, concurrency, timeout, direct=direct),
        model=name,
        base_url=base_url,
        api_key=SecretStr(key or "none"),
        temperature=0,
        timeout=timeout,
        stream_chunk_timeout=timeout,
        max_retries=0,
        stream_usage=True,
        use_responses_api=False,
    )


def open_endpoint(
    name: str, *, base_url: str | None, offline: bool, window: int | None, concurrency: int | None = None
) -> Model:
    """The model with its profile; asks the endpoint for its window unless `window` states it, in tokens.

    `concurrency`: calls in flight at a time.
    """
    if offline and not (base_url and _is_loopback(_checked_url(base_url))):
        raise ConfigError(
            f"the endpoint of {name!r} is not on this machine, and this run is offline",
            hint="name an endpoint on localhost, or a local model",
        )
    chat = endpoint_chat(name, base_url=base_url, concurrency=concurrency or CONCURRENCY)
    context = window or _ask_window(chat)
    warnings: tuple[Notice, ...] = ()
    if context is None:
        context = DEFAULT_WINDOW
        text = f"{chat.place} does not say how many tokens {name} takes; {DEFAULT_WINDOW} are assumed"
        warnings = (Notice("window_unknown", text, chat.place),)
    profile = ModelProfile(
        name=f"openai:{name}",
        kind="endpoint",
        fingerprint=hashlib.sha256(f"{LOADER} {chat.place} {name}".encode()).hexdigest(),
        context=context,
        concurrency=concurrency or CONCURRENCY,
        rate_in=2000.0,
        rate_out=40.0,
        latency=0.5,
    )
    return Model(chat, profile, EstimateCounter(), None, warnings)


def _probe(chat: EndpointChat) -> openai.OpenAI:
    url = chat.openai_api_base
    return openai.OpenAI(
        api_key=chat.secret,
        base_url=url,
        max_retries=0,
        timeout=_PROBE_TIMEOUT,
        http_client=openai.DefaultHttpxClient(mounts=NO_PROXY) if url and _is_loopback(url) else None,
    )


def _ask_window(chat: EndpointChat) -> int | None:
    """The window that the endpoint lists for the model, if it lists one; ModelError if it cannot be asked."""
    try:
        # A client of its own: a server that fails at this question may close the connection it came on.
        with chat.translated(), _probe(chat) as client:
            models = [model.model_dump() for model in client.models.list().data]
    except ModelError as error:
        if isinstance(error.__cause__, openai.APIConnectionError) or error.code == "auth":
            raise
        return None
    for model in models:
        if model.get("id") == chat.model_name:
            facts = model | (model.get("meta") or {})
            sizes = [facts[field] for field in _WINDOW_FIELDS if isinstance(facts.get(field), int)]
            return min(sizes, default=None)
    return None


def _checked_url(base_url: str) -> str:
    """The URL, with the login of AGENTCTX_BASE_URL if that is the same place. ConfigError if it is none."""
    try:
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError(base_url)
    except ValueError:
        shown = base_url.rpartition("@")[2]  # without a password
        hint = "it looks like http://localhost:8000/v1"
        raise ConfigError(f"{shown!r} is not an endpoint", hint=hint) from None
    named = os.environ.get(URL, "")
    with suppress(ValueError):  # of a setting that is none
        if without_login(named) == base_url:
            return named
    return base_url


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
