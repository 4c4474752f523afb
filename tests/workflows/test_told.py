"""What a local model says of how it answered reaches the result, and it is told whose text it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult

from agentctx.api import Context
from agentctx.cli.render import answer_lines
from agentctx.memory.types import Document, LeftOut
from agentctx.result import result
from agentctx.testing import ScriptedChat, ScriptedReader, WordCounter, finding, scripted_model
from agentctx.workflows.frame import Strategy
from agentctx.workflows.ports import SOURCES, Scores
from agentctx.workflows.profile import ModelProfile
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Task
from agentctx.workflows.strategies.continuation import Continuation
from agentctx.workflows.strategies.experience import Experience
from agentctx.workflows.strategies.rank import Rank

TEXTS = {
    "a.txt": "The light of the island is kept by Renn since May. Its lamp burns oil.\n",
    "b.txt": "Geese return in autumn to the western shore. The light of the island is seen from there.\n",
}


class Telling(ScriptedChat):
    """Says with every reply what `told` holds; keeps what it is told."""

    told: dict[str, Any]
    sources: list[list[str]] = []

    def _generate(self, messages: list[BaseMessage], *args: Any, **options: Any) -> ChatResult:
        self.sources.append([name for one in messages for name in one.additional_kwargs.get(SOURCES, ())])
        found = super()._generate(messages, *args, **options)
        message = found.generations[0].message
        assert isinstance(message, AIMessage)
        message.response_metadata |= self.told
        return found


class Listening(ScriptedReader):
    def __init__(self) -> None:
        super().__init__(lambda question, text: -float(len(text)))
        self.sources: dict[str, list[str]] = {}

    async def likelihood(self, question: str, texts: Any, sources: Any = ()) -> Scores:
        self.sources |= dict(zip(texts, sources, strict=True))
        return await super().likelihood(question, texts)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def reply(messages: list[BaseMessage]) -> dict[str, Any]:
    return {"text": "x"}


def test_drafts_and_what_was_left_out_are_summed(folder: Path) -> None:
    bracket = {"rows": 10, "low": 0.1, "high": 0.5, "worst": 0.9, "fallbacks": 2}
    chat = Telling(
        reply=reply,
        told={"draft_tokens": 4, "accepted_tokens": 3, "attention": bracket},
    )
    opened = Context.open(list(TEXTS), model=scripted_model(chat), ephemeral=True)
    answer = opened.ask("Who keeps the light?", strategy="map_reduce")
    calls = len(chat.prompts)
    assert calls > 0
    assert (answer.usage.draft_tokens, answer.usage.accepted_tokens) == (4 * calls, 3 * calls)
    left = answer.coverage.attention
    assert left is not None and left.rows == 10 * calls and left.fallbacks == 2 * calls
    assert (left.low, left.high, left.worst) == pytest.approx((0.1, 0.5, 0.9))
    shown = result(answer, "ask").model_dump(mode="json")
    assert shown["coverage"]["attention"]["rows"] == 10 * calls
    assert shown["usage"]["draft_tokens"] == 4 * calls
    assert any("attention left out 10% to 50%" in line.text for line in answer_lines(answer))


def test_brackets_add_up_by_rows() -> None:
    assert LeftOut(1, 0.0, 0.2, 0.3, 0) + LeftOut(3, 0.4, 0.6, 0.7, 5) == LeftOut(
        4, pytest.approx(0.3), pytest.approx(0.5), 0.7, 5
    )


def test_a_model_is_told_whose_text_it_reads(folder: Path) -> None:
    chat, reader = Telling(reply=lambda messages: "Renn", told={}), Listening()
    model = scripted_model(chat, reader=reader, tiers=frozenset({"reads"}))  # it has sentences picked for it
    opened = Context.open(list(TEXTS), model=model, ephemeral=True)
    opened.ask("Who keeps the light?", strategy="spans")
    assert chat.sources and all(set(names) <= set(TEXTS) and names for names in chat.sources)
    assert reader.sources
    for text, names in reader.sources.items():
        line = text.rpartition("\n")[2] or text
        holders = [name for name, whole in TEXTS.items() if text in whole]
        assert names == (holders or [name for name, whole in TEXTS.items() if line in whole]) != []


LONG = {
    name: "\n".join(
        f"Entry {n} of {name}: the ship number {n} sailed in weather {n % 7}."
        if n != 123
        else f"Entry {n} of {name}: the code of Zed is K{len(name)}."
        for n in range(200)
    )
    for name in ("logs/one.txt", "logs/second.txt")
}


@pytest.mark.parametrize(
    "strategy",
    [
        Rank(mode="window", by="passage", passage_tokens=64, top=2),
        Experience(context_tokens=1200, result_tokens=300, steps=4),
        Continuation(context_tokens=1200, result_tokens=300, steps=4),
    ],
    ids=lambda strategy: strategy.name,
)
def test_whatever_quotes_a_document_is_told_to_be_its_text(strategy: Strategy) -> None:
    """The pieces of such prompts have labels that no document has: notes, results of tools, candidates."""
    chat = Telling(reply=finding(r"the code of (\w+ is \w+)"), told={})
    model = scripted_model(chat, context=3000, tiers=frozenset({"reads", "writes", "judges", "plans"}))
    documents = [Document.of(text, name) for name, text in LONG.items()]
    Context.open(documents, model=model, ephemeral=True).ask("What is the code of Zed?", strategy=strategy)
    quoted = 0
    for prompt, names in zip(chat.prompts, chat.sources, strict=True):
        holders = {
            name
            for name, text in LONG.items()
            if any(line in prompt for line in [*text.splitlines(), f"the code of Zed is K{len(name)}"])
        }
        assert holders <= set(names) <= set(LONG)
        quoted += bool(holders)
    assert quoted


def test_a_sentence_under_its_heading_is_of_the_document_that_has_both() -> None:
    heading, sentence = "The light: its keepers", "It is kept by Renn."
    documents = [Document.of(f"# {heading}\n\n{sentence}", "a.txt"), Document.of("Geese return.", "b.txt")]
    profile = ModelProfile("m", "local", "f", 1000)
    scope = Scope(Task("?"), {one.id: one for one in documents}, profile, WordCounter(), "1")
    assert scope.holders(f"Keepers: {sentence}") == ["a.txt"]
    assert scope.holders(f"x\n{sentence}") == ["a.txt"]
    assert scope.holders(f"{heading}: {sentence}") == ["a.txt", "b.txt"], "of any, if nobody knows"
    assert scope.holders("Geese: \n") == ["a.txt", "b.txt"]
