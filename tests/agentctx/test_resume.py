"""Kill a real process in the middle of a run, then resume it: no finished call is made again."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest

from agentctx.models.endpoint import CONCURRENCY
from agentctx.testing import finding
from agentctx.testing_endpoint import ScriptedEndpoint

QUESTION = "What is the code of Zed?"


def start(tmp_path, endpoint, *args):
    env = {**os.environ, "AGENTCTX_HOME": str(tmp_path / "home"), "AGENTCTX_API_KEY": "none"}
    command = [sys.executable, "-m", "agentctx", *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture
def hay(tmp_path):
    rng = random.Random(4)
    lines = [f"Sentence {n} speaks of {rng.choice('abcdefgh') * 5} and no more." for n in range(2000)]
    lines[700] = "The code of Zed is K77."
    path = tmp_path / "hay.txt"
    path.write_text(" ".join(lines))
    return path


@pytest.mark.parametrize("strategy", ["map_reduce", "recursive"])
@pytest.mark.parametrize("kill_after", [3, 17])
def test_a_killed_run_repeats_no_finished_call(tmp_path, hay, strategy, kill_after):
    ask = ["ask", QUESTION, str(hay), "--json", "--strategy", strategy, "--window", "2000"]
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\."), delay=0.05) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url]
        whole = finish(start(tmp_path / "undisturbed", endpoint, *ask, *model))
        assert whole["status"] == "complete"
        assert len(endpoint.finished) > kill_after + 8
        endpoint.finished.clear()

        process = start(tmp_path, endpoint, *ask, *model, "--run-id", "r")
        while len(endpoint.finished) < kill_after:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.2)  # what was in flight at the kill ends on the server's side
        before = list(endpoint.finished)
        recorded = _recorded(tmp_path)
        assert recorded >= kill_after - CONCURRENCY

        resumed = finish(start(tmp_path, endpoint, "runs", "resume", "r", "--json"))
    asked = Counter(endpoint.finished)
    repeated = sum(count - 1 for count in asked.values())
    # A reply that was on its way when the process died, or not yet stored, is asked for again.
    assert repeated <= len(before) - recorded
    assert resumed["answer"] == whole["answer"]
    assert resumed["citations"] == whole["citations"]
    assert resumed["status"] == "complete"
    for name, ceiling in resumed["plan"]["ceiling"].items():
        assert resumed["usage"][name] <= ceiling


def _recorded(tmp_path):
    """Calls whose records are stored; replies as they came are stored beside them."""
    with closing(sqlite3.connect(tmp_path / "home" / "cache" / "calls.db")) as database:
        values = [json.loads(value) for (value,) in database.execute("SELECT value FROM calls")]
    return sum("response_metadata" not in value for value in values)


def test_resuming_a_complete_run_gives_its_answer_without_a_call(tmp_path, hay):
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url, "--run-id", "r"]
        first = finish(start(tmp_path, endpoint, "ask", QUESTION, str(hay), "--json", *model))
        calls = endpoint.started
        again = finish(start(tmp_path, endpoint, "runs", "resume", "r", "--json"))
        assert endpoint.started == calls
    assert again["answer"] == first["answer"]


def test_an_unknown_run_is_named(tmp_path):
    process = start(tmp_path, None, "runs", "resume", "nothing", "--json")
    out, _ = process.communicate()
    assert process.returncode == 3
    assert "nothing" in json.loads(out)["error"]["message"]
