"""After a request to stop: what is in flight gets the grace time, what finishes the run all its time."""

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from agentctx.memory.types import Document
from agentctx.testing import ScriptedChat, WordCounter
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.profile import ModelProfile
from agentctx.workflows.registry import strategy
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.send import Attempt, attempt_call
from agentctx.workflows.state import Task
from agentctx.workflows.trace import Trace

GRACE = 0.02  # seconds; the model takes ten times as long


@pytest.fixture
def run():
    document = Document.of("The code of Zed is K77.")
    profile = ModelProfile("m", "scripted", "f", 4000)
    scope = Scope(Task("What is the code?"), {document.id: document}, profile, WordCounter(), "t")
    chat = ScriptedChat(reply=lambda messages: "K77", delay=10 * GRACE)
    cache = LeafCache(None)
    yield RunContext("r", scope, chat, strategy("direct").plan(scope), cache, Trace("r"), grace=GRACE)
    cache.close()


def called(run, *, finishing):
    role = Role("answer", 1, "Answer.", None, 10)
    attempt = Attempt(1, "k", 5, finishing, False, False, None, run.model)
    return attempt_call(run, role, [HumanMessage("When?")], attempt)


async def test_what_finishes_a_stopped_run_has_all_its_time(run):
    run.stop.request("interrupted")
    assert isinstance(await called(run, finishing=True), AIMessage)


@pytest.mark.parametrize("finishing", [False, True])
async def test_what_is_in_flight_at_the_request_has_the_grace_time(run, finishing):
    call = asyncio.create_task(called(run, finishing=finishing))
    while not run.ledger.reserved.calls:
        await asyncio.sleep(0)
    run.stop.request("interrupted")
    assert (await call).kind == "timeout"
