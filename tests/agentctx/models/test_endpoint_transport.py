"""Connections in lanes: more calls than lanes, calls after calls, and no lanes behind a proxy."""

import asyncio

import pytest
from langchain_core.messages import HumanMessage

from agentctx.models.endpoint import endpoint_chat
from agentctx.models.endpoint_transport import lanes_client
from agentctx.testing_endpoint import ScriptedEndpoint

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.mark.parametrize("lanes", [1, 3, 16])
async def test_every_call_is_answered_whatever_the_number_of_lanes(lanes, monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    with ScriptedEndpoint(lambda messages: str(messages[-1].text).upper(), delay=0.005) as endpoint:
        chat = endpoint_chat("scripted", base_url=endpoint.url, concurrency=lanes)
        for _ in range(3):
            calls = [chat.ainvoke([HumanMessage(f"call {n}")]) for n in range(10)]
            replies = await asyncio.gather(*calls)
            assert [reply.text for reply in replies] == [f"CALL {n}" for n in range(10)]
        await chat.http_async_client.aclose()
    assert len(endpoint.finished) == 30


def test_a_proxy_is_left_to_the_client_that_finds_it(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert lanes_client("http://example.org/v1", 4, 30.0, direct=False) is None
    assert lanes_client("http://localhost:8000/v1", 4, 30.0, direct=True) is not None  # no proxy is for it
