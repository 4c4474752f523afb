"""The one door to the model: cache, reserve, call, settle, parse, repair, record.

Nothing else in the project calls a chat model. A call that gives nothing returns a Failure, so that one
failed leaf does not end a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from pydantic import ValidationError

from agentctx.memory.types import Failure
from agentctx.workflows.cache import call_key
from agentctx.workflows.halves import Pieces, halves
from agentctx.workflows.ports import CALL, SOURCES
from agentctx.workflows.roles import Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.send import Attempt, attempt_call, without_surrogates
from agentctx.workflows.state import Record

MAX_RETRIES = 2  # per call, out of the run's pool
CUT_OFF = "cut_off"  # the mark of a record of which only the complete entries are known, and its warning
DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """How the calls of a node are made. `shared`: what another run was told may be used again."""

    attempts: int = MAX_RETRIES + 1
    timeout: float | None = None  # seconds for one call
    shared: bool = True


USUAL = Terms()
# A context variable, because between a node and its calls stand steps that know nothing of nodes.
_terms: ContextVar[Terms] = ContextVar("terms", default=USUAL)


@contextmanager
def on_terms(terms: Terms) -> Iterator[None]:
    """Make the calls of this block on these terms."""
    token = _terms.set(terms)
    try:
        yield
    finally:
        _terms.reset(token)


async def ask(
    run: RunContext,
    role: Role,
    question: str,
    pieces: Pieces,
    *,
    finishing: bool = False,
    stream: bool = False,
    model: BaseChatModel | None = None,
) -> Record | Failure:
    """Play `role` on the pieces and return its checked record, or a typed failure.

    `finishing` lets the call use the budget that is held back for finishing; `stream` emits token events;
    `model` takes the place of the run's: the same one over composed keys and values, whose answers are kept
    apart.
    """
    own: dict[str, str] = {} if _terms.get().shared else {"run": run.run_id}
    key = call_key(
        model=run.scope.profile.fingerprint,
        role=[role.name, role.version, role.max_output, _digest(role.instruction)],
        question=question,
        pieces=[[label, _digest(text)] for label, text in pieces],
        **own,
        **({"composed": True} if model else {}),
    )
    with run.trace.span():
        async with run.desk:
            cached = run.cache.get(key)
            if cached is not None:
                run.cached += 1
                run.trace.emit("cache.hit", role=role.name, key=key)
                return _told(run, Record(key, role.name, cached))
            if key not in run.inflight:
                by = model or run.model
                work = _attempts(run, role, question, pieces, key, by, finishing=finishing, stream=stream)
                task = asyncio.create_task(work)
                run.inflight[key] = task
                task.add_done_callback(lambda _: run.inflight.pop(key, None))
            # An equal call that is on its way already is awaited, not paid twice.
            result = cast("Record | Failure", await run.inflight[key])
        if isinstance(result, Failure) and result.kind == "overflow":
            again = partial(ask, run, role, question, finishing=finishing, model=model)
            result = await _in_halves(run, role, pieces, key, result, again)
        if isinstance(result, Failure):
            run.trace.emit("failure", role=role.name, kind=result.kind, message=result.message)
            return result
        return _told(run, result)


def _told(run: RunContext, record: Record) -> Record:
    """The record; if a part of it is missing, the run says so, whoever paid for it."""
    if record.data.get(CUT_OFF):
        run.warn(CUT_OFF, f"replies as {record.role} were cut off: only their complete entries are used")
    return record


async def _in_halves(
    run: RunContext,
    role: Role,
    pieces: Pieces,
    key: str,
    failure: Failure,
    again: Callable[[Pieces], Awaitable[Record | Failure]],
) -> Record | Failure:
    """What two calls over a half each gave, joined and kept as if one call had given it.

    A refused call costs no tokens, and two halves no more than their read and its like, so that two extra
    attempts of the run's pool pay for them: the plan's ceiling holds. Each half may be halved again.
    """
    if role.schema is None or role.schema.joins is None:
        return failure
    parts = await asyncio.to_thread(halves, pieces, _labels(run), run.scope.counter)
    if parts is None:
        return failure
    if not run.take_retry(2):
        return replace(failure, message=f"{failure.message}; no extra attempts are left to read it in halves")
    name, context = run.scope.profile.name, run.scope.profile.context
    run.warn("halved", f"{name} takes less than {context:,} tokens: what it refused was read in halves")
    run.trace.emit("halved", role=role.name, key=key)
    found = await asyncio.gather(*map(again, parts))
    failed = next((one for one in found if isinstance(one, Failure)), None)
    if failed:
        return failed
    halved = [one.data for one in found if isinstance(one, Record)]
    data = role.schema.joined(halved)
    if any(half.get(CUT_OFF) for half in halved):
        data[CUT_OFF] = True
    run.cache.put(key, data)
    return Record(key, role.name, data)


def _labels(run: RunContext) -> frozenset[str]:
    """Of the documents of the run."""
    return run.scope.keep("sources", lambda: frozenset(run.scope.labels()))


async def _attempts(
    run: RunContext,
    role: Role,
    question: str,
    pieces: Pieces,
    key: str,
    model: BaseChatModel,
    *,
    finishing: bool,
    stream: bool,
) -> Record | Failure:
    messages = role.render(question, pieces, run.scope.tag)
    messages[-1].additional_kwargs[SOURCES] = sorted(_sources(run, pieces))
    tokens = run.scope.prompt_tokens(messages)
    context = run.scope.profile.context
    terms = _terms.get()
    repaired, problem = False, ""
    number = 0
    while True:
        if tokens + role.max_output > context:
            if repaired:  # what is too long is the reply, not the text: halves of that would not help
                return Failure("parse", problem, attempt=number)
            return Failure(
                "overflow",
                f"the prompt has {tokens:,} tokens and the reply up to {role.max_output:,}; "
                f"the model accepts {context:,}",
            )
        number += 1
        again = number < terms.attempts
        messages[-1].additional_kwargs[CALL] = [role.name, key]
        attempt = Attempt(number, key, tokens, finishing, stream, again, terms.timeout, model)
        result = await attempt_call(run, role, messages, attempt)
        if isinstance(result, Failure):
            if result.retryable and again and run.take_retry():
                continue
            return result
        data, problem = parse(role, str(result.text))
        if data is not None:
            data = without_surrogates(data)  # which JSON may spell out
            run.cache.put(key, data)
            return Record(key, role.name, data)
        if repaired or not run.take_retry():
            return Failure("parse", problem, attempt=number)
        repaired = True
        messages = [
            *messages,
            result,
            HumanMessage(f"{problem[:300]} Reply again with the JSON object only."),
        ]
        tokens = run.scope.prompt_tokens(messages)


def _sources(run: RunContext, pieces: Pieces) -> Set[str]:
    """The documents whose text the pieces hold: notes and what tools gave may quote any of the run's."""
    every = _labels(run)
    labels = {label for label, _ in pieces}
    return labels if labels <= every else every


def parse(role: Role, text: str) -> tuple[dict[str, Any] | None, str]:
    """The reply as its role's schema wants it, or None and what is wrong with it.

    Of a reply that breaks off, the complete entries, marked `CUT_OFF`.
    """
    if role.schema is None:
        return {"text": role.clean(text)}, ""
    start = text.find("{")
    if start < 0:
        return None, "The reply holds no JSON object."
    try:
        value, _ = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        salvaged = _salvage(role.schema, text[start:])
        return salvaged, "" if salvaged else f"The reply is not valid JSON: {error}."
    try:
        return role.schema.model_validate(value).model_dump(), ""
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the object"
        return None, f"The reply does not fit the form: {place}: {first['msg']}."


def _salvage(schema: type[Reply], text: str) -> dict[str, Any] | None:
    """The complete items of a list that was cut off at the output limit, if the rest is valid with them."""
    entries: dict[str, list[Any]] = {}
    for name, info in schema.model_fields.items():
        if not (info.annotation and "list" in str(info.annotation)):
            continue
        at = text.find(f'"{name}"')
        at = text.find("[", at) + 1 if at >= 0 else 0
        items: list[Any] = []
        while at > 0:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            try:
                item, at = DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                break
            items.append(item)
        if items:
            entries[name] = items
    try:
        return {**schema.model_validate(entries).model_dump(), CUT_OFF: True} if entries else None
    except ValidationError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
