"""The memory of `fold`: edited by operations, bounded, and nothing that leaves it is destroyed."""

import json
import re
import sqlite3

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Document
from agentctx.paths import Paths
from agentctx.testing import ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.strategies.fold import Fold

FACT = re.compile(r"The (\w+) of (\w+) is (\w+)\.")
RAIN = "It rained again and again on the coast. " * 60


def editor(messages):
    """Keeps one note for each (what, whom); a later statement replaces the earlier one."""
    system, prompt = str(messages[0].text), str(messages[-1].text)
    texts = list(fenced_texts(prompt))
    facts = [m for text in texts for m in FACT.finditer(text)]
    if '"add"' not in system:
        claims = [{"text": m[0], "quotes": [m[0]]} for m in facts]
        return {"text": "; ".join(m[3] for m in facts), "claims": claims, "no_information": not claims}
    memory = dict(line.split(": ", 1) for line in texts[0].splitlines() if ": " in line)
    add, replace = [], []
    for m in facts:
        claim = {"text": f"{m[1]} {m[2]} {m[3]}", "quotes": [m[0]]}
        same = [key for key, text in memory.items() if text.startswith(f"{m[1]} {m[2]} ")]
        (replace.append({"id": same[0], **claim}) if same else add.append(claim))
    return {"add": add[:8], "replace": replace[:8]}


def folded(text, question="What is the code of Zed?", **params):
    chat = ScriptedChat(reply=editor)
    paths = params.pop("paths", None)
    model = scripted_model(chat, context=1500)
    context = Context.open([Document.of(text, "a.txt")], model=model, ephemeral=paths is None, paths=paths)
    return context.ask(question, strategy=Fold(**params)), chat


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_fact_in_the_first_the_middle_and_the_last_chunk_survives(lanes):
    facts = ["The code of Zed is K1.", "The code of Zed2 is K2.", "The code of Zed3 is K3."]
    answer, chat = folded(f"{facts[0]} {RAIN * 2}{facts[1]} {RAIN * 2}{facts[2]}", lanes=lanes)
    assert {citation.quote for citation in answer.citations} == set(facts)
    assert answer.coverage.read == answer.coverage.total
    assert chat.peak <= lanes


def test_a_replaced_note_is_gone_from_the_memory_and_still_in_the_store(tmp_path):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    text = f"The code of Zed is OLD. {RAIN * 2}The code of Zed is NEW."
    answer, _ = folded(text, paths=paths)
    assert [c.quote for c in answer.citations] == ["The code of Zed is NEW."]
    store = sqlite3.connect(paths.calls)
    values = {key: json.loads(value) for key, value in store.execute("SELECT key, value FROM calls")}
    store.close()
    memories = {key: value for key, value in values.items() if "before" in value}
    last = next(key for key in memories if key not in {memory["before"] for memory in memories.values()})
    texts = []
    while last:  # back from the last memory to the first
        texts.append([note["text"] for note in memories[last]["notes"]])
        last = memories[last]["before"]
    assert texts[0] == ["code Zed NEW"]
    assert ["code Zed OLD"] in texts


def test_the_memory_is_bounded_and_keeps_what_bears_on_the_question():
    others = " ".join(f"The weight of ship{n} is t{n}. {RAIN[:200]}" for n in range(60))
    answer, chat = folded(f"The code of Zed is K77. {others}", memory_tokens=60)
    assert "K77" in answer.text
    for prompt in chat.prompts[:-1]:
        memory = next(iter(fenced_texts(prompt)))
        assert len(memory.split()) <= 60


def test_an_edit_of_a_note_that_is_not_there_changes_nothing():
    chat = ScriptedChat(reply=lambda messages: {"drop": ["n9"], "replace": [], "add": []})
    model = scripted_model(chat, context=1500)
    context = Context.open([Document.of(RAIN * 3, "a.txt")], model=model, ephemeral=True)
    answer = context.ask("What is the code of Zed?", strategy=Fold())
    assert answer.status == "unanswerable"
    assert any(warning.code == "unknown_note" for warning in answer.warnings)


def test_it_stops_early_only_when_told_to():
    text = f"The code of Zed is K77. {RAIN * 4}"

    def complete(messages):
        reply = editor(messages)
        return {**reply, "complete": True} if "add" in reply else reply

    def run(early):
        model = scripted_model(ScriptedChat(reply=complete), context=1500)
        context = Context.open([Document.of(text, "a.txt")], model=model, ephemeral=True)
        return context.ask("What is the code of Zed?", strategy=Fold(early=early))

    assert run(True).usage.calls < run(False).usage.calls
    assert run(True).coverage.unread
    assert not run(False).coverage.unread


@pytest.mark.parametrize("params", [{"chunk_tokens": 10}, {"memory_tokens": 0}, {"lanes": 0}, {"passes": 0}])
def test_parameters_out_of_range_are_refused(params):
    with pytest.raises(ConfigError):
        Fold(**params)
