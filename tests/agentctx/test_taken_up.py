"""A run that is taken up in this process: its limits, its warnings, and that an offline one is not traced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langsmith import utils

from agentctx.api import Context
from agentctx.cli.main import run
from agentctx.memory.errors import BudgetExceeded
from agentctx.memory.types import Budget, Document
from agentctx.paths import Paths
from agentctx.runs import Runs
from agentctx.testing import ScriptedChat, finding, scripted_model
from agentctx.testing_endpoint import ScriptedEndpoint

REPLY = finding(r"The code of (\w+ is \w+)\.")
HAY = "Nothing here. " * 1500 + "The code of Zed is K77."
LIMITS = Budget(calls=2, input_tokens=200_000)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTCTX_API_KEY", "none")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", "http://127.0.0.1:9")
    utils.get_env_var.cache_clear()
    yield
    utils.get_env_var.cache_clear()


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint(REPLY) as endpoint:
        yield endpoint


def stopped(endpoint: ScriptedEndpoint) -> None:
    """Leave a run "r" that ended by its limit of calls."""
    context = Context.open(text=HAY, model="openai:scripted", base_url=endpoint.url, window=2000)
    with pytest.raises(BudgetExceeded):
        context.ask("What is the code of Zed?", strategy="map_reduce", budget=LIMITS, run_id="r")


def test_a_new_limit_leaves_the_others(endpoint: ScriptedEndpoint) -> None:
    stopped(endpoint)
    answer = Context.resume("r", budget=Budget(calls=500))
    assert answer.status == "complete" and "K77" in answer.text
    kept = Runs(Paths.default().runs).manifest("r")["budget"]
    assert (kept["calls"], kept["input_tokens"]) == (500, 200_000)


@pytest.mark.parametrize("variable", ["LANGSMITH_TRACING", "LANGCHAIN_TRACING"])
def test_an_offline_run_is_not_traced_whatever_was_found_before(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    assert utils.tracing_is_enabled(), "langsmith remembers this"
    traced = []

    def reply(messages: Any) -> Any:
        traced.append(utils.tracing_is_enabled())
        return REPLY(messages)

    model = scripted_model(ScriptedChat(reply=reply))
    context = Context.open(
        [Document.of("The code of Zed is K77.")], model=model, ephemeral=True, offline=True
    )
    assert not context.corpus.warnings
    context.ask("What is the code?")
    assert traced and not any(traced)


def test_a_resumed_run_says_whether_it_is_traced_now(
    endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "TRUE")  # told of, but langsmith itself wants lower case
    stopped(endpoint)
    again = Budget(calls=3)
    with pytest.raises(BudgetExceeded) as caught:
        Context.resume("r", budget=again)
    assert caught.value.partial is not None
    told = [notice.code for notice in caught.value.partial.warnings]
    assert told.count("tracing") == 1 and len(told) == len(set(caught.value.partial.warnings))
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    utils.get_env_var.cache_clear()
    assert utils.tracing_is_enabled()
    traced = []
    answer = Context.resume(
        "r",
        budget=Budget(calls=500),
        offline=True,
        on_event=lambda event: traced.append(utils.tracing_is_enabled()),
    )
    assert traced and not any(traced)
    assert "tracing" not in [notice.code for notice in answer.warnings]


def test_the_command_line_takes_limits_from_its_flags_alone(
    endpoint: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(endpoint)
    monkeypatch.setenv("AGENTCTX_MAX_OUTPUT_TOKENS", "7")
    assert run(["ask", "--resume", "r", "--max-calls", "500", "-q"]) == 0
    kept = Runs(Paths.default().runs).manifest("r")["budget"]
    assert (kept["calls"], kept["input_tokens"], kept["output_tokens"]) == (500, 200_000, None)
