"""Every fault at every call: a run ends in an Answer or in an error of ours, never in a bug."""

import json

import pytest
from conformance_cases import EACH, FACT, chat_of, haystack, opened, spent
from pydantic import Field

from agentctx.memory.errors import AgentctxError, BudgetExceeded, ModelError
from agentctx.testing import ScriptedChat, finding

GOOD = finding(FACT)


def _truncated(messages):
    reply = GOOD(messages)
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return text[: len(text) * 2 // 3]


FAULTS = {
    "timeout": lambda messages: ModelError("late", code="timeout"),
    "unavailable": lambda messages: ModelError("gone", code="unavailable"),
    "malformed": lambda messages: "Sure! {not json",
    "refusal": lambda messages: ModelError("I cannot help with that", code="refused"),
    "wrong schema": lambda messages: {"unexpected": [1, {"a": None}]},
    "wrong types": lambda messages: dict.fromkeys(json.loads(_form(messages)), 7),
    "empty": lambda messages: "",
    "truncated": _truncated,
    "overflow": lambda messages: ModelError("too long", code="overflow"),
}

PASSING = ("timeout", "unavailable")  # a second attempt goes through


def _form(messages):
    return str(messages[0].text).partition("in this form: ")[2] or "{}"


class OneFault(ScriptedChat):
    """Call number `at` goes wrong, and with `on` every later one."""

    fault: str = ""
    at: int = 0
    on: bool = False
    asked: list[int] = Field(default_factory=list)

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked.append(len(self.asked))
        number = self.asked[-1]
        bad = number == self.at or (self.on and number > self.at)
        self.reply = FAULTS[self.fault] if bad else GOOD
        return super()._generate(messages, stop, run_manager, **kwargs)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    async def at_once(run, seconds):
        return None

    monkeypatch.setattr("agentctx.workflows.send._pause", at_once)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_fault_at_any_call_ends_in_an_answer_or_a_typed_error(case, fault):
    text = haystack(140)
    undisturbed = chat_of()
    plan = case.plan(opened(undisturbed, text))
    expected = case.run(opened(undisturbed, text))
    calls = len(undisturbed.prompts)
    assert calls
    for at in range(calls):
        for on in (False, True):
            chat = OneFault(reply=GOOD, fault=fault, at=at, on=on)
            try:
                answer = case.run(opened(chat, text))
            except BudgetExceeded as error:
                answer = error.partial
            except AgentctxError:
                assert on or fault not in PASSING
                continue
            assert spent(answer).within(plan.ceiling)
            assert answer.status in ("complete", "partial", "unanswerable")
            if fault in PASSING and not on:
                assert (answer.text, answer.status) == (expected.text, "complete")
            assert all(c.span for c in answer.citations if c.verdict == "supported")
