"""Public test doubles: a scripted chat model, one that fails on purpose, one that replays a run, a Reader,
a counter.

They let a workflow be tested without weights: every call is recorded, usage is exact.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field, PrivateAttr

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.models.load import Model
from agentctx.paths import Paths
from agentctx.runs import Runs
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.ports import CALL, Counter, KVIndex, Reader, Scores
from agentctx.workflows.profile import ModelProfile, Tier
from agentctx.workflows.roles import Claim

Reply = Callable[[Sequence[BaseMessage]], str | dict[str, Any] | Exception]


class WordCounter:
    """Counts words and punctuation marks; a message costs four more. Exact for `ScriptedChat`."""

    exact = True

    def count_text(self, text: str) -> int:
        # Every four characters of a long word are one token, so that no text is free.
        return sum(-(-len(word) // 4) for word in text.split()) + text.count("\n")

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        return sum(4 + self.count_text(str(message.text)) for message in messages)


class ScriptedChat(BaseChatModel):
    """A chat model whose reply is a function of the messages.

    The function returns text, a dict (sent as JSON) or an exception (raised). `prompts` records every call
    that was sent, `delay` is seconds per call, `peak` the most calls that were in flight at once.
    """

    reply: Reply
    delay: float = 0.0
    output_tokens: int | None = None  # claim this many instead of counting
    prompts: list[str] = Field(default_factory=list)
    _flying: int = PrivateAttr(default=0)
    peak: int = 0

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self.prompts.append(str(messages[-1].text))
        reply = self.reply(messages)
        if isinstance(reply, Exception):
            raise reply
        text = reply if isinstance(reply, str) else json.dumps(reply)
        counter = WordCounter()
        read = counter.count_messages(messages)
        written = counter.count_text(text) if self.output_tokens is None else self.output_tokens
        if limit := kwargs.get("max_tokens"):
            written = min(written, limit)
        message = AIMessage(
            text,
            usage_metadata={"input_tokens": read, "output_tokens": written, "total_tokens": read + written},
            response_metadata={"model_name": "scripted"},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self._flying += 1
        self.peak = max(self.peak, self._flying)
        try:
            await asyncio.sleep(self.delay)
            return self._generate(messages, stop, None, **kwargs)
        finally:
            self._flying -= 1


class FaultyChat(ScriptedChat):
    """A `ScriptedChat` whose calls fail by a list: each entry an error to raise or None to go through.

    After the list is used up every call goes through.
    """

    faults: list[Any] = Field(default_factory=list)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            self.prompts.append(str(messages[-1].text))
            raise fault if isinstance(fault, Exception) else ModelError(f"injected: {fault}", code=str(fault))
        return super()._generate(messages, stop, run_manager, **kwargs)


class ReplayChat(BaseChatModel):
    """Answers as the calls of a run were answered, by call and ordinal: no model is needed.

    A call that the run did not make is an error that names it, or, with `live`, goes to that model; so do all
    calls of `live_roles`. A call's key depends on the model's fingerprint, so replay under the run's profile.
    """

    outcomes: dict[str, list[dict[str, Any]]]  # of each call, in order; consumed
    live: BaseChatModel | None = None
    live_roles: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        run_id: str,
        *,
        paths: Paths | None = None,
        live: BaseChatModel | None = None,
        live_roles: Iterable[str] = (),
    ) -> Self:
        """What the calls of that run gave, failures included. InputError for an unknown run."""
        paths = paths or Paths.default()
        outcomes: dict[str, list[dict[str, Any]]] = {}
        store = LeafCache(paths.calls)
        try:
            for event in Runs(paths.runs).trace(run_id):
                if event["event"] == "call.end":
                    data = event["data"]
                    kept = store.get(data["reply"]) if "reply" in data else {"error": data.get("error")}
                    if kept is not None:
                        outcomes.setdefault(data["key"], []).append(kept)
        finally:
            store.close()
        return cls(outcomes=outcomes, live=live, live_roles=frozenset(live_roles))

    @property
    def _llm_type(self) -> str:
        return "replay"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        role, key = messages[-1].additional_kwargs.get(CALL, ("unknown", ""))
        left = self.outcomes.get(key, [])
        if self.live and (role in self.live_roles or not left):
            return ChatResult(
                generations=[ChatGeneration(message=self.live.invoke(messages, stop=stop, **kwargs))]
            )
        if not left:
            raise ConfigError(
                f"the replayed run made no such call of role {role}, key {key}",
                hint="replay the same task over the same documents, model and parameters",
            )
        kept = left.pop(0)
        if "error" in kept:
            code, message = kept["error"] or ("unavailable", "the call was cancelled")
            raise ModelError(message, code=code)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(**kept))])


class ScriptedReader:
    """A Reader that scores by a function of (question, text). Counts every look."""

    def __init__(self, score: Callable[[str, str], float]) -> None:
        self.score = score
        self.looked: list[str] = []
        self._counter = WordCounter()

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        each = self._counter.count_text(question)
        return sum(self._counter.count_text(text) + each for text in texts)

    async def likelihood(
        self, question: str, texts: Sequence[str], sources: Sequence[Sequence[str]] = ()
    ) -> Scores:
        self.looked += texts
        values = tuple(self.score(question, text) for text in texts)
        return Scores(values, self.likelihood_cost(question, texts), 0)


class ScriptedIndex:
    """A `KVIndex` in which `held` says what is indexed; nearness and likelihood are by `score`.

    `answered` records the passages of every `composed`, which gives `chat`.
    """

    def __init__(
        self,
        chat: BaseChatModel,
        score: Callable[[str, str], float],
        *,
        held: Callable[[str], bool] = bool,
        passage_tokens: int = 200,
    ) -> None:
        self.chat = chat
        self.passage_tokens = passage_tokens
        self.reader = ScriptedReader(score)
        self.answered: list[tuple[str, ...]] = []
        self._score, self._held = score, held

    def held(self, texts: Sequence[str]) -> list[bool]:
        return [self._held(text) for text in texts]

    def nearest_cost(self, question: str) -> int:
        return WordCounter().count_text(question)

    async def nearest(self, question: str, texts: Sequence[str], k: int) -> Scores:
        values = [self._score(question, text) for text in texts]
        best = set(sorted(range(len(texts)), key=lambda i: -values[i])[:k])
        found = tuple(value if i in best else float("-inf") for i, value in enumerate(values))
        return Scores(found, self.nearest_cost(question), 0)

    def composed(self, texts: Sequence[str]) -> BaseChatModel:
        self.answered.append(tuple(texts))
        return self.chat


def scripted_model(
    chat: ScriptedChat,
    *,
    context: int = 2000,
    reliable: int | None = None,
    tiers: frozenset[Tier] = frozenset({"reads", "writes"}),
    concurrency: int = 4,
    reader: Reader | None = None,
    counter: Counter | None = None,
    index: KVIndex | None = None,
) -> Model:
    """A `Model` around a scripted chat, for `Context.open(…, model=…)`."""
    fingerprint = hashlib.sha256(f"{context} {reliable} {sorted(tiers)}".encode()).hexdigest()[:16]
    profile = ModelProfile(
        "scripted", "scripted", fingerprint, context, reliable or context, tiers, concurrency
    )
    return Model(chat, profile, counter or WordCounter(), reader, index=index)


def fenced_texts(prompt: str) -> Iterator[str]:
    """The document texts of a prompt, without their delimiters: what a scripted reply may look at."""
    for part in prompt.split("<text-")[1:]:
        yield part.split(">\n", 1)[1].split("\n</text-", 1)[0]


def finding(pattern: str) -> Reply:
    """A reply function of a perfect model: in every role it reports what matches `pattern`, and only that.

    The quote is the whole match, the statement its first group.
    """

    def reply(messages: Sequence[BaseMessage]) -> str | dict[str, Any]:
        system = str(messages[0].text)
        texts = list(fenced_texts(str(messages[-1].text)))
        matches = [match for text in texts for match in re.finditer(pattern, text)]
        claims = [Claim(text=match[1], quotes=[match[0]]).model_dump() for match in matches][:8]
        if '"facts"' in system:
            return {"facts": claims, "confidence": 5 if claims else 0, "no_information": not claims}
        if '"dead_ends"' in system:
            return {"done": ["looked"], "findings": claims}
        if '"tool"' in system:
            if claims:
                return {"answer": "; ".join(str(claim["text"]) for claim in claims), "claims": claims}
            return {"tool": "grep", "arguments": {"text": "code of"}}
        if '"gist"' in system:
            return {"gist": "; ".join(str(claim["quotes"]) for claim in claims) or "nothing of note"}
        if '"pages"' in system:
            lines = [line for text in texts for line in text.splitlines() if re.search(pattern, line)]
            return {"pages": [int(line.split()[1]) for line in lines if line.startswith("page ")][:12]}
        if '"ids"' in system:
            return {"ids": [number for number, text in enumerate(texts, 1) if re.search(pattern, text)]}
        if '"queries"' in system:
            return {"queries": [], "give_up": not claims}
        if '"add"' in system:
            return {"add": claims, "complete": bool(claims)}
        if '"items"' in system:
            items = [{"key": c["text"], "value": "stated", "quotes": c["quotes"]} for c in claims]
            return {"items": items, "no_information": not items}
        if '"label"' in system:
            label = str(messages[-1].text).rpartition("Labels: ")[2].split(";")[0].strip()
            quotes = [match[0] for match in matches][:4]
            return {"label": label, "quotes": quotes, "confidence": 5, "no_information": not quotes}
        if '"holds"' in system:
            return {"holds": True, "reason": "both are stated"}
        if '"points"' in system:
            return {"points": claims, "no_information": not claims}
        if '"claims"' in system:
            text = "; ".join(str(claim["text"]) for claim in claims)
            return {"text": text, "claims": claims, "no_information": not claims}
        return str(claims[0]["text"]) if claims else "nothing"

    return reply
