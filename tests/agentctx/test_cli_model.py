"""The command line from end to end: real files, the real API, the embedded model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentctx.paths import Paths
from agentctx.result import Result, Spent

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
LEASE = """# Lease

1. The rent is 400 pounds a month, due on the first day.

2. Either party may end the lease by giving five months' written notice.

3. The deposit is 900 pounds and is returned within four weeks.
"""


@pytest.fixture
def folder(tmp_path: Path, embedded: Paths, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and a home of its own that borrows the model and the kernels."""
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "models").symlink_to(embedded.models)
    (home / "cache" / "kernels").symlink_to(kernels)
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(home))
    monkeypatch.setenv("AGENTCTX_EMBED", "none")  # whatever else this machine holds
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "lease.md").write_text(LEASE)
    return tmp_path / "work"


def agentctx(folder: Path, *args: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agentctx", *args], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_a_question_is_answered_and_the_run_is_kept(folder: Path) -> None:
    asked = agentctx(folder, "ask", "How much notice ends the lease?", "lease.md", "--json", "--offline")
    said = Result.model_validate_json(asked)
    assert said.status == "complete" and said.model is not None and said.model.kind == "local"
    assert any("five months' written notice" in citation.quote for citation in said.citations)
    for citation in said.citations:
        assert citation.verdict == "supported" and LEASE[citation.start : citation.end] == citation.quote
    assert said.usage is not None and said.plan is not None
    assert said.usage.calls <= said.plan.ceiling.calls
    assert said.usage.input_tokens <= said.plan.ceiling.input_tokens
    (kept,) = json.loads(agentctx(folder, "runs", "ls", "--json"))["runs"]
    assert kept["run_id"] == said.run_id and kept["sources"] == ["lease.md"]
    again = Result.model_validate_json(agentctx(folder, "runs", "resume", str(said.run_id), "--json"))
    assert (again.answer, again.citations) == (said.answer, said.citations)
    events = json.loads(agentctx(folder, "trace", "show", str(said.run_id), "--json"))["events"]
    assert events[0]["event"] == "run.start"
    agentctx(folder, "runs", "rm", str(said.run_id))
    assert json.loads(agentctx(folder, "runs", "ls", "--json"))["runs"] == []


def test_a_second_question_reads_only_what_is_new(folder: Path) -> None:
    def usage(question: str) -> Spent:
        out = agentctx(folder, "ask", question, "lease.md", "--json", "--offline")
        said = Result.model_validate_json(out)
        assert said.usage is not None and said.warnings == []
        return said.usage

    first = usage("How much notice ends the lease?")
    assert first.reused_tokens == 0 and first.computed_tokens == first.input_tokens > 0
    second = usage("When is the deposit returned?")
    assert second.reused_tokens > 64 and second.computed_tokens < first.computed_tokens
    (kept,) = json.loads(agentctx(folder, "kv", "ls", "--json"))["kv"]
    assert kept["name"] == "smollm2" and kept["tokens"] > 64
    cached = usage("When is the deposit returned?")
    assert (cached.calls, cached.computed_tokens, cached.cached) == (0, 0, 1)
    for path in (folder.parent / "home").rglob("*.kv"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    out = agentctx(folder, "ask", "How high is the rent?", "lease.md", "--json", "--offline")
    damaged = Result.model_validate_json(out)
    assert damaged.status == "complete" and {warning.code for warning in damaged.warnings} == {"kv"}
    assert json.loads(agentctx(folder, "kv", "rm", "--all", "--json"))["freed"] > 0


def test_an_ephemeral_run_leaves_nothing(folder: Path) -> None:
    agentctx(folder, "ask", "What is the rent?", "lease.md", "--ephemeral", "--offline")
    home = folder.parent / "home"
    assert [path.name for path in (home / "cache").iterdir() if not path.is_symlink()] == []
    assert [path.name for path in home.iterdir()] == ["cache"]


def test_limits_that_nothing_fits_are_a_typed_end(folder: Path) -> None:
    out = agentctx(
        folder, "ask", "What is the rent?", "lease.md", "--max-input-tokens", "5", "--json", code=5
    )
    assert Result.model_validate_json(out).error is not None


def test_ctrl_c_gives_what_there_is_and_the_run_resumes(folder: Path) -> None:
    (folder / "long.txt").write_text("\n\n".join(f"{LEASE} Copy {number}." for number in range(80)))
    command = [
        sys.executable,
        "-m",
        "agentctx",
        "ask",
        "How much notice ends the lease?",
        "long.txt",
        "--stream",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] in ("reserve", "call.start"):
                break
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    said = Result.model_validate(json.loads(out.splitlines()[-1])["result"])
    assert process.returncode == 130, err
    assert (said.status, said.stopped_because) == ("partial", "interrupted")
    assert f"agentctx runs resume {said.run_id}" in err.decode()
