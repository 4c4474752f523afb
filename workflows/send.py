"""One attempt at one model call: a place, a reservation, a deadline, and an honest account afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.utils import message_chunk_to_message

from agentctx.memory.errors import AgentctxError, ModelError
from agentctx.memory.types import Cost, Failure, FailureKind, LeftOut
from agentctx.workflows.cache import call_key
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext

T = TypeVar("T")
TIMEOUT = 600.0  # seconds for one call when the run has no time limit
LONGEST_WAIT = 60.0  # seconds; an endpoint that asks for more is not waited for
_KINDS: dict[str, FailureKind] = {
    "rate_limit": "rate_limit",
    "timeout": "timeout",
    "overflow": "overflow",
    "malformed": "parse",
    "refused": "refusal",
}
_RETRYABLE = frozenset({"rate_limit", "timeout", "malformed", "unavailable"})
_UNREAD = frozenset({"auth", "not_fetched", "overflow"})  # refused before a token was read
FATAL = frozenset({"auth", "not_fetched"})  # every further call would fail the same way


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attempt needs to know besides its messages."""

    number: int
    key: str  # of the call
    tokens: int  # of the finished prompt
    finishing: bool
    stream: bool
    may_retry: bool
    timeout: float | None  # seconds; None: what the run has
    model: BaseChatModel


async def attempt_call(
    run: RunContext, role: Role, messages: Sequence[BaseMessage], attempt: Attempt
) -> AIMessage | Failure:
    """Send once. A retryable failure returns after its waiting time, so that the caller may try at once."""
    async with run.gate:
        refusal = _refusal(run, attempt)
        if refusal:
            return refusal
        worst = Cost(1, attempt.tokens, role.max_output)
        reservation = run.ledger.reserve(worst, finishing=attempt.finishing)
        if reservation is None:
            run.stopped_because = run.stopped_because or "budget"
            return Failure("budget", f"the budget has no room for one more call of role {role.name}")
        run.retried += attempt.number > 1
        said = {"role": role.name, "key": attempt.key, "attempt": attempt.number}
        run.trace.emit("call.start", **said, input_tokens=attempt.tokens)
        actual = worst  # a call that failed, timed out or was cancelled may have been paid in full
        error: ModelError | None = None
        reply: AIMessage | None = None
        outcome: dict[str, Any] = {}
        try:
            reply = await _send(run, role, messages, attempt)
            actual = _used(reply, worst)
            outcome = {"reply": _stored(run, reply)}  # before anything says that the call was made
            _note(run, reply)
        except TimeoutError:
            error = ModelError("no reply in the time that was left", code="timeout")
        except ModelError as caught:
            error = caught
            if caught.code in _UNREAD:
                actual = Cost(1, 0, 0)
        finally:
            if not run.ledger.settle(reservation, actual):
                run.trace.emit("overrun", role=role.name)
                run.warn("soft_ceiling", "the endpoint used more tokens than it was allowed to")
            if error:
                outcome = {"error": [error.code, error.message]}
            run.trace.emit("call.end", **said, ok=reply is not None, **outcome)
    if reply is not None:
        run.succeeded += 1
        return reply
    assert error is not None
    return await _failed(run, error, attempt)


def _stored(run: RunContext, reply: AIMessage) -> str:
    """Keep a reply, for a replay, under the id that is returned."""
    kept = reply.model_dump(
        mode="json", include={"content", "usage_metadata", "response_metadata"}, exclude_none=True
    )
    key = call_key(reply=kept)
    run.cache.put(key, kept)
    return key


def _refusal(run: RunContext, attempt: Attempt) -> Failure | None:
    if run.dead:
        return run.dead
    if not attempt.finishing and (reason := run.winding_down()):
        return Failure("cancelled", f"the run is finishing: {reason}")
    return None


async def _failed(run: RunContext, error: ModelError, attempt: Attempt) -> Failure:
    """Turn the error into a failure, wait if it is worth trying again, and notice a dead endpoint."""
    retryable = error.code in _RETRYABLE and (error.retry_after or 0) <= LONGEST_WAIT
    kind = _KINDS.get(error.code, "backend")
    failure = Failure(kind, error.message, retryable=retryable, attempt=attempt.number)
    if error.code in FATAL or (error.code == "unavailable" and not attempt.may_retry and not run.succeeded):
        run.dead = failure
        run.dead_error = error
    elif retryable and attempt.may_retry and run.retries_left:
        await _pause(run, error.retry_after or run.backoff * 2 ** (attempt.number - 1))
    return failure


async def _pause(run: RunContext, seconds: float) -> None:
    """Wait, but no longer than the run may take, and not beyond a stop request."""
    left = run.seconds_left()
    seconds = seconds if left is None else max(0.0, min(seconds, left))
    try:
        async with asyncio.timeout(seconds):
            await run.stop.requested()
    except TimeoutError:
        return


def _timeout(run: RunContext, allowed: float | None) -> float:
    left = run.seconds_left()
    most = allowed or TIMEOUT
    return most if left is None else max(0.05, min(most, left))


async def _send(run: RunContext, role: Role, messages: Sequence[BaseMessage], attempt: Attempt) -> AIMessage:
    """The call itself, ended by its timeout or, if it is in flight then, by the grace time after a request
    to stop. What finishes the run once it is stopped has all its time.
    """
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(_timeout(run, attempt.timeout)) as deadline:

        def soon() -> None:
            when = deadline.when()
            if when is not None and not deadline.expired():
                deadline.reschedule(min(when, clock() + run.grace))

        with run.stop.heard(soon):
            if run.stop.reason and not attempt.finishing:
                soon()
            try:
                reply = await _invoke(run, role, messages, attempt)
                return reply.model_copy(update={"content": without_surrogates(reply.content)})
            # The one door to chat models of others: what they may raise cannot be listed, and one failed
            # call must not end a run. It is raised again, as an error of ours; a cancellation stays one.
            except BaseException as foreign:
                if isinstance(foreign, AgentctxError | TimeoutError) or not isinstance(foreign, Exception):
                    raise
                said = without_surrogates(f"{type(foreign).__name__}: {foreign}"[:500])
                raise ModelError(said) from foreign


def without_surrogates(value: T) -> T:
    """Text, or JSON, whose characters are whole: half of one can be neither stored nor sent.

    Halves that stand side by side, as a stream may cut them, are one character; others become a mark.
    """
    text = json.dumps(value, ensure_ascii=False)
    whole: T = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return whole


async def _invoke(
    run: RunContext, role: Role, messages: Sequence[BaseMessage], attempt: Attempt
) -> AIMessage:
    if not attempt.stream:
        reply = await attempt.model.ainvoke(list(messages), max_tokens=role.max_output)
        return reply if isinstance(reply, AIMessage) else AIMessage(str(reply.text))
    whole = None
    async for chunk in attempt.model.astream(list(messages), max_tokens=role.max_output):
        run.trace.emit("token", text=without_surrogates(str(chunk.text)))
        whole = chunk if whole is None else whole + chunk
    if whole is None:
        raise ModelError("the model's stream held nothing", code="malformed")
    message = message_chunk_to_message(whole)
    return message if isinstance(message, AIMessage) else AIMessage(str(message.text))


def _note(run: RunContext, reply: AIMessage) -> None:
    """What the model says of itself: how much of the prompt it knew, how it came to its answer, and what
    failed on the way.
    """
    details = reply.usage_metadata.get("input_token_details", {}) if reply.usage_metadata else {}
    known = details.get("cache_read", 0)
    run.reused += known
    run.uncomputed += known
    told = reply.response_metadata
    run.drafted += told.get("draft_tokens", 0)
    run.accepted += told.get("accepted_tokens", 0)
    if "attention" in told:
        found = LeftOut(**told["attention"])
        run.left_out = run.left_out + found if run.left_out else found
    for warning in told.get("warnings", ()):
        run.warn("kv", str(warning))


def _used(reply: AIMessage, worst: Cost) -> Cost:
    """What the model says it used; a model that says nothing is charged the worst case."""
    if reply.usage_metadata is None:
        return worst
    return Cost(1, reply.usage_metadata["input_tokens"], reply.usage_metadata["output_tokens"])
