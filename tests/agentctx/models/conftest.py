"""The list of allowed skips of a test class is exact: another skip fails, and a listed test that runs."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from agentctx.models.local import LocalChat
from agentctx.models.weights import Weights


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    allowed = getattr(getattr(item, "cls", None), "allowed_skips", None)
    if allowed is None or not (report.skipped or (report.passed and call.when == "call")):
        return report
    name = getattr(item, "originalname", item.name)
    if report.skipped != (name in allowed) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = (
            f"{name} was {'skipped' if report.skipped else 'run'}, against the list of allowed skips"
        )
    return report


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: Path) -> Weights:
    return Weights.load(tiny_model, name="tiny")


@pytest.fixture
def tiny_chat(tiny_weights: Weights) -> LocalChat:
    return LocalChat(weights=tiny_weights, model_name="tiny", context=tiny_weights.context)
