"""`experience` and `continue`: bounded sight, nothing lost, and answers from what was seen."""

import re
import sqlite3

import pytest

from agentctx.api import Context
from agentctx.memory.errors import BudgetExceeded, ConfigError
from agentctx.memory.types import Budget, Cost, Document
from agentctx.paths import Paths
from agentctx.testing import ScriptedChat, WordCounter, fenced_texts, scripted_model
from agentctx.workflows.registry import strategy
from agentctx.workflows.strategies.continuation import Continuation
from agentctx.workflows.strategies.experience import Experience

LINES = [f"Entry {n}: the ship number {n} sailed in weather {n % 7}." for n in range(400)]
LINES[123] = "Entry 123: the code of Zed is K77."
TEXT = "\n".join(LINES)
QUESTION = "What is the code of Zed?"
PLANS = frozenset({"reads", "writes", "judges", "plans"})
KINDS = [Experience, Continuation]


def open_text(chat, paths=None, window=3000):
    model = scripted_model(chat, context=window, tiers=PLANS)
    return Context.open([Document.of(TEXT, "log.txt")], model=model, ephemeral=paths is None, paths=paths)


def walker(steps, last=None):
    """Reads forty lines a step; then answers with what `last` makes of the final prompt."""
    asked = []

    def reply(messages):
        system, prompt = str(messages[0].text), str(messages[-1].text)
        if '"findings"' in system:
            codes = re.findall(r"Entry \d+: the code of Zed is K77\.", prompt)[:1]
            return {"done": ["read on"], "findings": [{"text": "the code", "quotes": codes}], "next": "read"}
        asked.append(prompt)
        if len(asked) <= steps:
            first = (len(asked) - 1) * 10 % 390 + 1
            arguments = {"source": "log.txt", "first": first, "last": first + 9}
            return {"thought": f"step {len(asked)}", "tool": "read", "arguments": arguments}
        quotes = re.findall(r"Entry \d+: the code of Zed is K77\.", prompt)[:1]
        return {"answer": "K77" if quotes else "unknown", "claims": [{"text": "K77", "quotes": quotes}]}

    return reply, asked


def small(kind, **params):
    return kind(context_tokens=1200, result_tokens=300, **params)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_ever_sees_more_than_the_limit_and_the_plan_holds(kind):
    reply, asked = walker(39)
    chat = ScriptedChat(reply=reply)
    answer = open_text(chat).ask(QUESTION, strategy=small(kind, steps=50))
    counter = WordCounter()
    assert max(counter.count_text(prompt) for prompt in asked) <= 1200
    spent = Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)
    assert spent.within(answer.plan.ceiling)
    assert len(asked) == 40
    assert 0 < answer.coverage.read <= answer.coverage.total


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_left_the_context_is_still_in_the_store(kind, tmp_path):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    reply, _ = walker(39)
    open_text(ScriptedChat(reply=reply), paths).ask(QUESTION, strategy=small(kind, steps=50))
    store = sqlite3.connect(paths.calls)
    kept = b"".join(value for (value,) in store.execute("SELECT value FROM calls")).decode()
    store.close()
    assert all(f"Entry {n}: " in kept for n in range(390))


def test_a_summary_carries_a_finding_over_many_rounds():
    """The fact stands in line 124; twenty-six steps and several summaries later it answers."""
    reply, asked = walker(39)
    answer = open_text(ScriptedChat(reply=reply)).ask(
        QUESTION, strategy=small(Continuation, steps=50, summaries=20)
    )
    assert answer.text.startswith("K77")
    assert [c.quote for c in answer.citations] == ["Entry 123: the code of Zed is K77."]
    assert sum('name="e' in prompt and "summary" in prompt for prompt in asked) > 10


def test_an_archived_entry_is_recalled_word_for_word():
    def reply(messages):
        prompt = str(messages[-1].text)
        asked.append(prompt)
        if len(asked) <= 20:
            first = len(asked) * 10
            return {"tool": "read", "arguments": {"source": "log.txt", "first": first, "last": first + 9}}
        if len(asked) == 21:
            return {"tool": "recall", "arguments": {"id": "e1"}}
        first, last = originals["e1"], list(fenced_texts(prompt))[-1]
        return {"answer": "same" if first in last else "lost"}

    asked, originals = [], {}
    listen = ScriptedChat(reply=reply)
    context = open_text(listen)
    originals["e1"] = "\n".join(LINES[9:19])
    answer = context.ask(QUESTION, strategy=small(Experience, steps=30))
    assert answer.text.startswith("same")
    assert any("archived" in prompt and "e1: read" in prompt for prompt in asked)


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("shell", {"cmd": "ls"}, "there is no tool 'shell'"),
        ("read", {"source": "/etc/passwd", "first": 1}, "no such source"),
        ("read", {"source": "../log", "first": 1}, "no such source"),
        ("read", {"source": "log.txt", "first": 900}, "has lines 1 to 400"),
        ("read", {"source": "log.txt", "first": "x"}, "needs numbers"),
        ("recall", {"id": "e99"}, "no entry 'e99'; the ids are:"),
        ("archive", {"id": "e99"}, "no entry 'e99'; the ids are:"),
        ("grep", {"text": ""}, 'grep needs "text"'),
        ("grep", {"text": "zebra"}, "no line holds 'zebra'"),
        ("find", {}, 'find needs "words"'),
        ("find", {"words": "xylophone"}, "shares a word"),
        ("search_archive", {"words": "ship"}, "the archive is empty"),
    ],
)
def test_a_wrong_use_of_a_tool_is_answered_with_what_would_work(tool, arguments, told):
    prompts = []

    def reply(messages):
        prompts.append(str(messages[-1].text))
        if len(prompts) == 1:
            return {"tool": tool, "arguments": arguments}
        return {"answer": "enough"}

    open_text(ScriptedChat(reply=reply)).ask(QUESTION, strategy=small(Experience, steps=5))
    assert told in prompts[1]


def test_tools_find_the_line_and_a_repeated_call_is_said():
    prompts = []

    def reply(messages):
        prompts.append(str(messages[-1].text))
        if len(prompts) <= 2:
            return {"tool": "grep", "arguments": {"text": "CODE of zed"}}
        if len(prompts) == 3:
            return {"tool": "find", "arguments": {"words": "code Zed"}}
        return {"answer": "K77", "claims": [{"text": "K77", "quotes": ["the code of Zed is K77."]}]}

    answer = open_text(ScriptedChat(reply=reply)).ask(QUESTION, strategy=small(Experience, steps=9))
    assert "log.txt:124: Entry 123: the code of Zed is K77." in prompts[1]
    assert "this was asked before" in prompts[2]
    assert "from line" in prompts[3]
    assert answer.status == "complete"


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_run_out_end_in_an_answer_from_what_is_live(kind):
    def reply(messages):
        if '"tool"' in str(messages[0].text):
            return {"tool": "grep", "arguments": {"text": "code of Zed"}}
        quote = "the code of Zed is K77."
        return {"text": "K77", "claims": [{"text": "K77", "quotes": [quote]}]}

    answer = open_text(ScriptedChat(reply=reply)).ask(QUESTION, strategy=small(kind, steps=3))
    assert answer.text.startswith("K77")
    assert any(warning.code == "out_of_steps" for warning in answer.warnings)


def test_a_summary_that_cannot_be_used_is_replaced_by_one_of_titles():
    reply, asked = walker(39)
    chat = ScriptedChat(reply=lambda m: "no" if '"findings"' in str(m[0].text) else reply(m))
    answer = open_text(chat).ask(QUESTION, strategy=small(Continuation, steps=50))
    assert any(warning.code == "summary_failed" for warning in answer.warnings)
    assert any("done: e1 read log.txt" in prompt for prompt in asked)


def test_reasoning_goes_on_in_segments_without_tools():
    def reply(messages):
        prompts.append(str(messages[-1].text))
        if '"findings"' in str(messages[0].text):
            return {"done": ["thought"], "next": "go on"}
        if len(prompts) < 14:
            return {"thought": "so it follows that " * 40}
        return {"answer": "42"}

    prompts = []
    answer = open_text(ScriptedChat(reply=reply)).ask(
        "Why?", strategy=small(Continuation, mode="reasoning", steps=30)
    )
    assert answer.text.startswith("42")
    assert any("done: thought" in prompt for prompt in prompts)


def test_a_budget_that_ends_early_leaves_a_partial_answer():
    reply, _ = walker(39)
    context = open_text(ScriptedChat(reply=reply))
    with pytest.raises(BudgetExceeded) as caught:
        context.ask(QUESTION, strategy=small(Experience, steps=50), budget=Budget(calls=5))
    answer = caught.value.partial
    assert answer.usage.calls <= 5
    assert answer.status == "partial"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("experience", {"steps": 0}),
        ("experience", {"result_tokens": 4}),
        ("experience", {"context_tokens": 500}),
        ("continue", {"mode": "dream"}),
        ("continue", {"summaries": 0}),
    ],
)
def test_parameters_out_of_range_are_refused(name, params):
    with pytest.raises(ConfigError):
        strategy(name, **params)
