"""From what the OpenAI client, its transport and langchain raise to our ModelError codes."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any

import openai
from langchain_core.exceptions import ContextOverflowError, LangChainException

from agentctx.memory.errors import ModelError
from agentctx.models.failures import ContextOverflow

_SHOWN = 300  # characters of an endpoint's own message
_OVERFLOW_WORDS = (
    "context_length_exceeded",
    "maximum context length",
    "context window",
    "context size",
    "context length",
    "prompt is too long",
    "too many tokens",
)
# httpx under openai 2, httpx2 under 3: the module of the class that its own client extends.
TRANSPORT: Any = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # how the clients meet odd JSON

CLIENT_ERRORS: tuple[type[Exception], ...] = (
    openai.OpenAIError,
    LangChainException,
    TRANSPORT.HTTPError,
    TimeoutError,
    *_MALFORMED,
)


def as_model_error(error: Exception, *, place: str = "the endpoint", secret: str = "") -> ModelError:
    """The ModelError for `error`; `secret` never appears in its text."""
    if isinstance(error, ModelError):
        return error
    said = _said(error, secret)
    if _is_overflow(error, said):
        return ContextOverflow(
            f"{place} refused the prompt as too long: {said}",
            hint="lower `window`, or raise the server's own",
        )
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, place, said)
    if _is_timeout(error):
        return ModelError(
            f"{place} did not answer in time", code="timeout", hint="is it still loading the model?"
        )
    if isinstance(error, openai.APIResponseValidationError):
        return ModelError(f"{place} sent a malformed reply: {said}", code="malformed")
    if isinstance(error, openai.APIConnectionError):
        return ModelError(
            f"{place} cannot be reached: {said}", hint="is the server running, and the URL right?"
        )
    if isinstance(error, openai.OpenAIError | TRANSPORT.HTTPError):
        return ModelError(f"{place} broke off: {said}")
    if isinstance(error, _MALFORMED):
        return ModelError(f"{place} sent a malformed reply: {said}", code="malformed")
    return ModelError(f"{place} failed: {type(error).__name__}: {said}")


def _of_status(error: openai.APIStatusError, place: str, said: str) -> ModelError:
    status, wait = error.status_code, _retry_after(error)
    if status in {401, 403}:
        return ModelError(
            f"{place} refused the key ({status}): {said}",
            code="auth",
            hint="set AGENTCTX_API_KEY or OPENAI_API_KEY",
        )
    if status == 429:
        return ModelError(f"{place} is busy ({status}): {said}", code="rate_limit", retry_after=wait)
    if status == 404:
        return ModelError(
            f"{place} has no such model or path ({status}): {said}", hint="check --model and --base-url"
        )
    if status in {408, 504}:
        return ModelError(
            f"{place} did not answer in time ({status}): {said}", code="timeout", retry_after=wait
        )
    if status < 500:
        return ModelError(f"{place} refused the request ({status}): {said}", code="refused")
    return ModelError(f"{place} failed ({status}): {said}", retry_after=wait)


def _is_overflow(error: Exception, said: str) -> bool:
    if isinstance(error, ContextOverflowError):
        return True
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 413:
            return True
        if error.status_code not in {400, 422}:
            return False
    elif not isinstance(error, openai.APIError):
        return False
    return any(words in f"{said} {getattr(error, 'code', '')}".lower() for words in _OVERFLOW_WORDS)


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, TimeoutError | openai.APITimeoutError | TRANSPORT.TimeoutException)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds to wait, from the header's number or date."""
    value = error.response.headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _said(error: Exception, secret: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if secret:
        text = text.replace(secret, "[key]")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
