"""Runs on disk that are damaged, of another version, or badly named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentctx.api import Context
from agentctx.cli.main import run
from agentctx.memory.errors import InputError, StoreError
from agentctx.memory.types import Document
from agentctx.paths import Paths
from agentctx.runs import LONGEST, Runs
from agentctx.testing import ScriptedChat, finding, scripted_model

REPLY = finding(r"The code of (\w+ is \w+)\.")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A good run "good" among others."""
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    context = Context.open(
        [Document.of("The code of Zed is K77.")], model=scripted_model(ScriptedChat(reply=REPLY))
    )
    context.ask("What is the code?", run_id="good")
    return Runs(Paths.default().runs)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 99}', "another version"),
    ],
)
def test_a_run_that_cannot_be_read_is_listed_and_can_be_removed(
    runs: Runs, text: str, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.folder("bad").mkdir()
    (runs.folder("bad") / "run.json").write_text(text)
    assert {one.run_id: one.status for one in runs.list()} == {"bad": status, "good": "complete"}
    assert run(["runs", "ls", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    with pytest.raises(StoreError) as caught:
        runs.manifest("bad")
    assert "runs rm bad" in caught.value.hint
    assert run(["runs", "rm", "bad"]) == 0
    assert [one.run_id for one in runs.list()] == ["good"]
    with pytest.raises(InputError, match="no run bad"):
        runs.remove("bad")


@pytest.mark.parametrize("name", ["x" * 300, "é" * LONGEST, "a/b", "", ".."])
def test_a_name_that_is_none_is_refused(runs: Runs, name: str) -> None:
    with pytest.raises(InputError, match="is no run id"):
        runs.folder(name)
    assert runs.folder("x" * LONGEST).parent == runs.root
