"""Whole runs against a real server on loopback."""

from agentctx.api import Context
from agentctx.memory.types import Document
from agentctx.testing import finding
from agentctx.testing_endpoint import ScriptedEndpoint

TEXT = " ".join([*(f"Sentence {n} says nothing." for n in range(1500)), "The code of Zed is K77."])


def test_one_context_is_asked_twice_and_streamed(tmp_path):
    """Each plain call has a loop of its own; connections of the last loop must not be used in the next."""
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        ctx = Context.open(
            [Document.of(TEXT, "hay.txt")],
            model="openai:scripted",
            base_url=endpoint.url,
            window=2000,
            ephemeral=True,
        )
        first = ctx.ask("What is the code of Zed?")
        second = ctx.ask("Which code has Zed?")
        *events, third = ctx.stream("What code is it that Zed has?")
    assert [answer.text for answer in (first, second, third)] == ["Zed is K77 [1]"] * 3
    assert any(event.event == "call.start" for event in events)
    assert first.usage.calls == second.usage.calls > 1
    assert first.usage.input_tokens <= first.plan.ceiling.input_tokens
