"""`agentctx workflow`: what is printed, with which exit code; and the README's example."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentctx.cli.main import run
from agentctx.paths import Paths
from agentctx.testing import finding
from agentctx.testing_endpoint import ScriptedEndpoint
from agentctx.workflows.definition.export import schema
from agentctx.workflows.definition.folder import open_definition
from agentctx.workflows.definition.table import TYPES
from agentctx.workflows.registry import STRATEGIES

ROOT = Path(__file__).parents[2]
FLOWS = sorted((ROOT / "examples" / "workflows").glob("*.yaml"))
HAY = " ".join(f"Sentence {n} speaks of nothing." for n in range(900)) + " The code of Zed is K77."


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTCTX_API_KEY", "none")
    monkeypatch.chdir(tmp_path)
    Path("hay.txt").write_text(HAY)


@pytest.mark.parametrize("file", FLOWS, ids=lambda path: path.stem)
def test_a_file_is_validated_and_drawn(file, capfd):
    assert run(["workflow", "validate", str(file), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["name"], said["command"]) == (file.stem, "workflow validate")
    assert run(["workflow", "draw", str(file)]) == 0
    drawn = capfd.readouterr().out
    assert all(re.search(rf"\b{name}\b", drawn) for name in said["nodes"]), drawn


def test_a_wrong_file_ends_with_2_and_three_lines_at_most(capfd):
    Path("flow.yaml").write_text(FLOWS[0].read_text().replace("nodes:", "nods:"))
    for command in ("validate", "draw", "plan", "run"):
        assert run(["workflow", command, "flow.yaml"]) == 2
        out, err = capfd.readouterr()
        assert not out and re.match(r"error: flow.yaml:10: nods: this key is not known", err)
        assert err.splitlines()[1] == "hint: did you mean 'nodes'?"
    assert run(["workflow", "validate", "nothing.yaml"]) == 3
    assert run(["workflow", "run", str(FLOWS[0]), "hay.txt", "--strategy", "auto"]) == 2


def test_a_question_comes_from_the_file_or_the_caller(capfd):
    terms = next(str(path) for path in FLOWS if path.stem == "contract_terms")
    assert run(["workflow", "plan", terms, "hay.txt"]) == 2
    assert "--question TEXT" in capfd.readouterr().err


def test_a_file_is_planned_and_run_over_an_endpoint(capfd):
    terms = next(str(path) for path in FLOWS if path.stem == "contract_terms")
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url, "--window", "3000"]
        asked = [terms, "hay.txt", "--question", "What is the code of Zed?", "--json", *model]
        assert run(["workflow", "plan", *asked]) == 0
        planned = json.loads(capfd.readouterr().out)
        assert not endpoint.finished and planned["status"] == "planned"
        assert run(["workflow", "run", *asked, "--run-id", "mine"]) == 0
        said = json.loads(capfd.readouterr().out)
        assert (said["strategy"], said["status"]) == ("contract_terms", "complete")
        assert said["usage"]["calls"] <= planned["plan"]["ceiling"]["calls"]
        assert run(["runs", "resume", "mine", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["answer"] == said["answer"]


def test_a_stopped_run_is_taken_up_without_its_file(capfd):
    folder = Path("flows")
    folder.mkdir()
    terms = next(path for path in FLOWS if path.stem == "contract_terms")
    (folder / "flow.yaml").write_text(terms.read_text())
    (folder / "prompts").mkdir()
    (folder / "prompts" / "terms.md").write_text("Note the terms.")
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url, "--window", "3000"]
        asked = ["flows/flow.yaml", "hay.txt", "--question", "What is the code of Zed?", "--json", *model]
        assert run(["workflow", "run", *asked, "--run-id", "mine", "--max-calls", "2"]) == 5
        capfd.readouterr()
        (folder / "flow.yaml").unlink()
        done = len(endpoint.finished)
        from agentctx.api import Context
        from agentctx.memory.types import Budget

        answer = Context.resume("mine", budget=Budget(calls=100))
        assert answer.status == "complete" and "Zed is K77" in answer.text
        assert len(set(endpoint.finished)) == len(endpoint.finished) > done, "no call was made twice"


def test_list_names_what_a_file_may_name(capfd):
    assert run(["workflow", "list", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert list(said["types"]) == list(TYPES) and said["strategies"] == list(STRATEGIES)


def test_the_shipped_schema_is_that_of_the_models(capfd):
    """When this fails: `python -m agentctx.workflows.definition.export > agentctx/schemas/workflow.json`."""
    assert run(["workflow", "schema"]) == 0
    assert capfd.readouterr().out == schema()


def test_help_loads_nothing_heavy():
    probe = (
        "import sys; from agentctx.cli.main import run; run(['workflow', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('yaml', 'langgraph', 'torch', 'langchain_core')))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_readme_runs(capfd):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    Path("look_further.yaml").write_text(block)
    assert open_definition("look_further.yaml").name == "look_further"
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url, "--window", "3000"]
        question = ["--question", "What is the code of Zed?"]
        assert run(["workflow", "run", "look_further.yaml", "hay.txt", *question, *model]) == 0
    assert "Zed is K77 [1]" in capfd.readouterr().out


@pytest.mark.parametrize("kill_after", [2, 7])
def test_a_killed_run_repeats_no_finished_call(tmp_path, kill_after):
    terms = next(str(path) for path in FLOWS if path.stem == "contract_terms")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*args):
        command = [sys.executable, "-m", "agentctx", *args, "--json"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\."), delay=0.1) as endpoint:
        model = ["--model", "openai:scripted", "--base-url", endpoint.url, "--window", "2000"]
        asked = ["workflow", "run", terms, "hay.txt", "--question", "What is the code of Zed?", *model]
        process = start(*asked, "--run-id", "r")
        while len(endpoint.finished) < kill_after:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)  # what was in flight at the kill ends on the server's side
        trace = tmp_path / "home" / "state" / "runs" / "r" / "trace.jsonl"
        events = [json.loads(line) for line in trace.read_text().splitlines()]
        started = {event["data"]["key"] for event in events if event["event"] == "call.start"}
        with contextlib.closing(sqlite3.connect(Paths.default().calls)) as calls:
            stored = sum(key in started for (key,) in calls.execute("SELECT key FROM calls"))
        before = len(endpoint.finished)
        resumed = start("runs", "resume", "r")
        out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    said = json.loads(out)
    assert said["status"] == "complete" and "Zed is K77" in said["answer"]
    repeated = len(endpoint.finished) - len(set(endpoint.finished))
    assert repeated <= before - stored, "a reply that was not stored is asked for again, and no other"
    assert said["usage"]["calls"] <= said["plan"]["ceiling"]["calls"]
