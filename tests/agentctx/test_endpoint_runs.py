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


def test_an_endpoint_that_takes_less_than_it_was_said_to_is_read_in_halves(tmp_path):
    reply = finding(r"The code of (\w+ is \w+)\.")
    with ScriptedEndpoint(reply, window=1700) as endpoint:
        ctx = Context.open(
            [Document.of(TEXT[-9000:], "hay.txt")],
            model="openai:scripted",
            base_url=endpoint.url,
            window=4000,
            ephemeral=True,
        )
        plan = ctx.plan("What is the code of Zed?", strategy="map_reduce", kind="aggregate")
        answer = ctx.ask("What is the code of Zed?", strategy="map_reduce", kind="aggregate")
    assert any("halves" in told for told in plan.assumptions)
    assert endpoint.refused
    assert (answer.status, answer.coverage.read) == ("complete", answer.coverage.total)
    assert "K77" in answer.text or "Zed" in answer.text
    assert answer.usage.calls == endpoint.refused + len(endpoint.finished) <= plan.ceiling.calls
    assert "halved" in {warning.code for warning in answer.warnings}
