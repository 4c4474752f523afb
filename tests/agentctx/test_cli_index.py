"""`agentctx index` from the command line: real processes, real files, and what can go wrong with them."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentctx.cli.main import run
from agentctx.paths import Paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, kernels, tiny_model):
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("AGENTCTX_HOME", str(home))
    monkeypatch.setenv("AGENTCTX_MODEL", str(tiny_model))
    monkeypatch.setenv("AGENTCTX_MEMORY_BYTES", str(60 << 20))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.txt").write_text(" ".join(f"Note {n}.{part} says {n * part}." for part in range(30)))
    return folder


def said(capsys):
    return json.loads(capsys.readouterr().out)


def kinds(capsys, code):
    assert run(["index", "verify", "--json"]) == code
    return sorted(one["kind"] for one in said(capsys)["problems"])


def test_a_directory_is_indexed_listed_checked_and_removed(notes, home, capsys):
    assert run(["index", "notes", "--json"]) == 0
    (row,) = said(capsys)["indexed"]
    assert (row["path"], row["documents"]) == ("notes", 4)
    assert row["fresh"] == row["passages"] > 4
    assert run(["index", "ls", "--json"]) == 0
    (one,) = said(capsys)["indexes"]
    assert one["root"] == str(notes)
    assert one["kept"] == one["passages"] == row["passages"]
    stored = sum(path.stat().st_size for path in Paths.default().kv.glob("*/*/*.kv"))
    assert one["bytes"] == stored
    assert kinds(capsys, 0) == []
    assert run(["index", "notes"]) == 0
    assert "0 of them new, 0 tokens read" in capsys.readouterr().out
    assert run(["index", "rm", "notes", "--json"]) == 0
    assert said(capsys)["freed"] == stored
    assert not list(Paths.default().kv.glob("*/*/*.kv"))
    assert run(["index", "ls", "--json"]) == 0
    assert said(capsys)["indexes"] == []


def test_what_changed_or_is_gone_is_told(notes, capsys):
    assert run(["index", "notes"]) == 0
    (notes / "1.txt").write_text("Something else.")
    (notes / "2.txt").unlink()
    capsys.readouterr()
    assert kinds(capsys, 1) == ["changed", "deleted"]
    assert run(["index", "notes"]) == 0
    capsys.readouterr()
    assert kinds(capsys, 0) == []


def test_a_path_is_pinned_and_let_go_again(notes, capsys):
    assert run(["index", "notes", "--pin"]) == 0
    files = list(Paths.default().kv.glob("*/*/*.kv"))
    capsys.readouterr()
    assert run(["index", "ls", "--json"]) == 0
    assert said(capsys)["indexes"][0]["pinned"] is True
    assert not any(path.stat().st_mode & 0o200 for path in files)
    assert run(["index", "unpin", "notes"]) == 0
    assert all(path.stat().st_mode & 0o200 for path in files)
    files[0].unlink()
    capsys.readouterr()
    assert run(["index", "pin", "notes", "--json"]) == 0
    assert said(capsys)["missing"] == 1
    assert run(["index", "pin", "elsewhere"]) == 3
    assert run(["index", "unpin", "elsewhere"]) == 3
    assert run(["index", "rm", "notes"]) == 0
    assert not list(Paths.default().kv.glob("*/*/*.kv"))


def test_damage_is_found_and_repaired(notes, capsys):
    assert run(["index", "notes"]) == 0
    (vectors,) = Paths.default().index.glob("*/*.faiss")
    vectors.write_bytes(vectors.read_bytes()[:-7])
    block = min(Paths.default().kv.glob("*/*/*.kv"))
    block.write_bytes(block.read_bytes()[:-9] + b"scratched")
    capsys.readouterr()
    assert kinds(capsys, 1) == ["corrupt", "corrupt"]
    assert not block.exists()
    assert run(["index", "notes"]) == 0
    told = capsys.readouterr()
    assert "it was made again" in told.err
    assert " 1 of them new" in told.out
    assert kinds(capsys, 0) == []


@pytest.mark.parametrize("damage", ["nonsense", "version"])
def test_an_index_that_cannot_be_read_is_told_and_can_be_removed(notes, capsys, damage):
    assert run(["index", "notes"]) == 0
    (database,) = Paths.default().index.glob("*/index.db")
    if damage == "version":
        with sqlite3.connect(database) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    else:
        for path in database.parent.glob("index.db*"):
            path.write_bytes(b"nonsense" * 2000)
    assert run(["index", "notes"]) == 1
    assert "hint: " in capsys.readouterr().err
    assert run(["index", "ls", "--json"]) == 0
    assert said(capsys)["indexes"][0]["problem"]
    assert kinds(capsys, 1) == ["version" if damage == "version" else "corrupt"]
    assert run(["index", "rm", "--all"]) == 0
    assert run(["index", "notes"]) == 0
    assert "0 tokens read" in capsys.readouterr().out  # its KV was not lost
    assert kinds(capsys, 0) == []


def test_what_cannot_be_indexed_is_a_typed_error(tmp_path, notes, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert run(["index", "empty"]) == 3
    assert run(["index", "notes", "--max-files", "0"]) == 2
    assert run(["index", "absent"]) == 3
    assert run(["index"]) == 2
    assert run(["index", "verify", "elsewhere"]) == 3
    assert run(["index", "rm", "elsewhere"]) == 3
    assert run(["index", "rm"]) == 2
    monkeypatch.setenv("AGENTCTX_EPHEMERAL", "true")
    assert run(["index", "notes"]) == 2
    monkeypatch.delenv("AGENTCTX_EPHEMERAL")
    monkeypatch.setenv("AGENTCTX_KV_BYTES", "0")
    assert run(["index", "notes"]) == 6
    monkeypatch.setenv("AGENTCTX_KV_BYTES", "20000")
    assert run(["index", "notes"]) == 1
    assert "kv_bytes" in capsys.readouterr().err


def test_killed_and_side_by_side_the_index_is_whole_and_complete(tmp_path, home, capsys):
    """Two processes index the same folder; one is killed while it reads, and the other finishes."""
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n}.txt").write_text(" ".join(f"Line {n}.{part} is {n + part}." for part in range(60)))
    command = [sys.executable, "-m", "agentctx", "index", "many"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not read() and both[0].poll() is None:
        time.sleep(0.02)
    both[0].send_signal(signal.SIGKILL)
    _, first = both[0].communicate()
    _, second = both[1].communicate(timeout=200)
    assert both[1].returncode == 0, second
    assert run(["index", "many", "--json"]) == 0
    (row,) = said(capsys)["indexed"]
    assert row["computed_tokens"] == 0
    assert kinds(capsys, 0) == []


def read():
    """Whether passages are in an index by now."""
    for path in Paths.default().index.glob("*/index.db"):
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return bool(db.execute("SELECT count(*) FROM passages").fetchone()[0])
        except sqlite3.OperationalError:
            return False
        finally:
            db.close()
    return False
