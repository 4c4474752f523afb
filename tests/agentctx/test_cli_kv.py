"""`agentctx kv`, and where else the store of what was read is shown."""

import json
import os

import pytest
import torch

from agentctx.cli.main import run
from agentctx.doctor import examine
from agentctx.memory.errors import StoreError
from agentctx.memory.kv.owners import owned
from agentctx.memory.kv.store import BlockStore
from agentctx.paths import Paths
from agentctx.secret import kept_secret


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def kept(home):
    """One block of 64 tokens for each of two models; their sizes."""
    for model, name in (("abc123", "smollm2"), ("def456", "other")):
        store = BlockStore(Paths.default().kv, model, budget=1 << 30, name=name)
        store.put("ab1", *torch.randn(2, 2, 1, 64, 16))
    return [path.stat().st_size for path in Paths.default().kv.glob("*/*/*.kv")]


def said(capsys):
    return json.loads(capsys.readouterr().out)


def test_an_empty_store_is_listed_and_cleared(capsys):
    assert run(["kv", "ls", "--json"]) == 0
    assert said(capsys)["kv"] == []
    assert run(["kv", "rm", "--all"]) == 0
    assert capsys.readouterr().out == "0.0 MB freed\n"


def test_what_is_kept_is_listed_by_model(kept, capsys):
    assert run(["kv", "ls", "--json"]) == 0
    rows = said(capsys)["kv"]
    assert sorted((row["name"], row["model"], row["tokens"]) for row in rows) == [
        ("other", "def456", 64),
        ("smollm2", "abc123", 64),
    ]
    assert [row["bytes"] for row in rows] == kept
    assert run(["kv", "ls"]) == 0
    assert "smollm2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["smollm2", "abc123"])
def test_one_model_s_is_deleted_by_name_or_id(kept, capsys, name):
    assert run(["kv", "rm", "--model", name, "--json"]) == 0
    assert said(capsys)["freed"] == kept[0]
    assert run(["kv", "ls", "--json"]) == 0
    assert [row["name"] for row in said(capsys)["kv"]] == ["other"]


def test_all_is_deleted_when_asked(kept, capsys):
    assert run(["kv", "rm", "--all", "--json"]) == 0
    assert said(capsys)["freed"] == sum(kept)
    assert not list(Paths.default().kv.glob("*/*/*"))


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 2),
        (["--all", "a.txt"], 2),
        (["--all", "--model", "smollm2"], 2),
        (["nothing"], 3),
        (["--model", "nothing"], 3),
    ],
)
def test_what_is_meant_must_be_clear(kept, capsys, args, code):
    assert run(["kv", "rm", *args]) == code
    assert len(list(Paths.default().kv.glob("*/*/*.kv"))) == 2


@pytest.fixture
def documents(home):
    """Two documents of one model: a block of each alone, one of both, and one that nobody names."""
    store = BlockStore(Paths.default().kv, "abc123", budget=1 << 30, name="smollm2")
    for name in ("aa1", "bb1", "cc1", "dd1"):
        store.put(name, *torch.randn(2, 2, 1, 64, 16))
    store.own(["aa1"], ["a.txt"])
    store.own(["bb1", "gone"], ["b\n.txt"])
    store.own(["cc1"], ["a.txt", "b\n.txt"])
    return store


def test_what_is_kept_is_listed_by_document(documents, capsys):
    documents.own(["aa1"], ["a.txt"])  # read again
    size = next(documents.folder.glob("*/*.kv")).stat().st_size
    assert run(["kv", "ls", "--json"]) == 0
    rows = said(capsys)["documents"]
    assert {(row["document"], row["blocks"], row["bytes"]) for row in rows} == {
        ("a.txt", 2, 2 * size),
        ("b\n.txt", 2, 2 * size),
        (None, 1, size),
    }
    assert rows[0]["document"] == "a.txt" and rows[0]["models"] == ["smollm2"]
    assert rows[-1]["document"] is None
    assert run(["kv", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "a.txt" in shown and "(no document)" in shown
    assert all(path.stat().st_mode & 0o077 == 0 for path in documents.folder.glob("lists/*"))


def test_of_a_document_goes_all_that_was_read_of_it_also_together_with_others(documents, capsys):
    size = next(documents.folder.glob("*/*.kv")).stat().st_size
    assert run(["kv", "rm", "a.txt", "--json"]) == 0
    assert said(capsys)["freed"] >= 2 * size
    assert [name in documents for name in ("aa1", "bb1", "cc1", "dd1")] == [False, True, False, True]
    assert run(["kv", "ls", "--json"]) == 0
    assert [row["document"] for row in said(capsys)["documents"]] == ["b\n.txt", None]
    assert run(["kv", "rm", "a.txt"]) == 3
    assert run(["kv", "rm", ""]) == 3
    assert run(["kv", "rm", "b\n.txt"]) == 0
    assert [name in documents for name in ("bb1", "dd1")] == [False, True]
    assert not list(documents.folder.glob("lists/*"))


def test_a_document_is_named_again_after_it_was_deleted(documents):
    assert run(["kv", "rm", "a.txt"]) == 0
    documents.put("aa1", *torch.randn(2, 2, 1, 64, 16))
    documents.own(["aa1"], ["a.txt"])
    assert {one.document for one in owned(documents.shelf)} == {"a.txt", "b\n.txt", None}


def test_a_damaged_list_names_nothing(documents, capsys):
    for path in documents.folder.glob("lists/*"):
        path.write_bytes(b"\xff{")
    assert run(["kv", "ls", "--json"]) == 0
    assert [row["document"] for row in said(capsys)["documents"]] == [None]
    for path in documents.folder.glob("lists/*"):
        path.write_text("7\naa1\n")
    assert run(["kv", "ls", "--json"]) == 0
    assert [row["document"] for row in said(capsys)["documents"]] == [None]


def test_paths_and_doctor_show_its_place_and_size(kept, capsys):
    assert run(["paths", "--json"]) == 0
    shown = said(capsys)
    assert shown["paths"]["kv"] == str(Paths.default().kv) and shown["kv_bytes"] == sum(kept)
    (check,) = [check for check in examine(Paths.default()) if check.name == "KV store"]
    assert check.ok and str(Paths.default().kv) in check.detail and "smollm2" in check.detail


def test_budgets_are_settings(capsys, monkeypatch):
    assert run(["config", "show", "--json"]) == 0
    assert said(capsys)["settings"]["kv_bytes"] == 4 << 30
    monkeypatch.setenv("AGENTCTX_KV_BYTES", "-1")
    assert run(["config", "show", "--json"]) == 2
    monkeypatch.setenv("AGENTCTX_KV_BYTES", "0")
    monkeypatch.setenv("AGENTCTX_MEMORY_BYTES", "1000")
    capsys.readouterr()
    assert run(["config", "show", "--json"]) == 0
    settings = said(capsys)["settings"]
    assert (settings["kv_bytes"], settings["memory_bytes"]) == (0, 1000)


def test_the_secret_is_made_once_and_private(home):
    path = Paths.default().secret
    secret = kept_secret(path)
    assert len(secret) == 32 and kept_secret(path) == secret
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(b"short")
    assert kept_secret(path) not in (secret, b"short")
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="secret"):
        kept_secret(path)
