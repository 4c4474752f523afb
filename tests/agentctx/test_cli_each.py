"""`ask --each`, `map` and `rank` on the command line, with a scripted API: forms, flags, exit codes."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentctx.cli.main import run
from agentctx.each import Row
from agentctx.memory.errors import InputError
from agentctx.result import Result

SCRIPT = Path(__file__).parent / "scripted_api.py"


@pytest.fixture(autouse=True)
def api(tmp_path, monkeypatch):
    """A home, a working directory with two files, and the scripted API."""
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("a.txt").write_text("The court ruled on 3 May.\nNobody appealed.\n")
    Path("b.txt").write_text("It rained.\n")
    spec = importlib.util.spec_from_file_location("agentctx.api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "agentctx.api", module)
    return module


def test_each_source_has_its_block(capfd):
    assert run(["ask", "when?", "a.txt", "b.txt", "--each"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "== a.txt",
        "when?",
        "",
        "[1] a.txt",
        "    The court ruled on 3 May.",
        "",
        "== b.txt",
        "when?",
        "",
        "[1] b.txt",
        "    It rained.",
        "",
    ]
    assert err == "warning: the window was not probed (window_uncalibrated)\n", "said once, not for each"


def test_a_map_is_a_table(api, capfd):
    given = ["map", "when?", "a.txt", "b.txt", "--per", "chunk", "--chunk-tokens", "90", "--max-calls", "4"]
    assert run(given) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["source", "characters", "status", "answer", "cited"]
    assert lines[1].split()[:4] == ["a.txt", "0-43", "complete", "when?"]
    assert lines[2].endswith("It rained.") and len(lines) == 3
    divided = api.Context.divided
    assert (divided["per"], divided["chunk_tokens"], divided["budget"].calls) == ("chunk", 90, 4)


@pytest.mark.parametrize("door", [["ask", "--each"], ["map"]])
@pytest.mark.parametrize("flag", ["--json", "--stream"])
def test_rows_are_json_lines(capfd, door, flag):
    assert run([door[0], "when?", "a.txt", "b.txt", *door[1:], flag]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    if flag == "--stream":
        assert [line["event"] for line in lines].count("token") == 2
        lines = [line["result"] for line in lines if line["event"] == "result"]
    rows = [Result.model_validate(line) for line in lines]
    assert [(row.source, row.status, row.answer) for row in rows] == [
        ("a.txt", "complete", "when?"),
        ("b.txt", "complete", "when?"),
    ]
    assert {row.command for row in rows} == {door[0]}
    assert rows[1].citations[0].quote == "It rained." and rows[1].span.end == 11


@pytest.mark.parametrize(("text", "code", "status"), [("down", 6, "failed"), ("budget", 5, "partial")])
def test_one_that_fails_gives_its_code_and_the_others_their_answers(capfd, text, code, status):
    Path("bad.txt").write_text(f"{text}\n")
    assert run(["ask", "when?", "a.txt", "bad.txt", "b.txt", "--each", "--json"]) == code
    rows = [Result.model_validate_json(line) for line in capfd.readouterr().out.splitlines()]
    assert [row.status for row in rows] == ["complete", status, "complete"]
    assert rows[1].error is not None and rows[0].error is None
    assert run(["map", "when?", "a.txt", "bad.txt"]) == code
    assert "failed" in (out := capfd.readouterr().out) or "partial" in out
    assert run(["ask", "when?", "bad.txt", "--each"]) == code
    assert "error: " in capfd.readouterr().out


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_source_that_was_left_out_has_a_row_but_no_exit_code(api, capfd, monkeypatch, form):
    error = InputError("b.bin is binary", code="binary", source="b.bin")
    monkeypatch.setattr(
        api.Context,
        "each",
        lambda *_, **__: SimpleNamespace(rows=lambda **_: [Row("b.bin", None, error=error)]),
    )
    for door in (["map"], ["ask", "--each"]):
        assert run([door[0], "when?", "a.txt", *door[1:], *form]) == 0
        out = capfd.readouterr().out
        if form:
            found = Result.model_validate_json(out)
            assert (found.source, found.span, found.status, found.error.code) == (
                "b.bin",
                None,
                "failed",
                "binary",
            )
        else:
            assert "b.bin" in out and "binary" in out


def test_its_plan_is_shown_without_a_run(capfd):
    for given in (["ask", "when?", "a.txt", "--each"], ["map", "when?", "a.txt"]):
        assert run([*given, "--dry-run"]) == 0
        assert capfd.readouterr().out.startswith("strategy spans, at most 3 calls")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["map"], "a question is missing"),
        (["map", "q", "a.txt", "--per", "page"], "'--per'"),
        (["map", "q", "a.txt", "--run-id", "r"], "not one run"),
        (["ask", "q", "a.txt", "--each", "--resume", "r"], "not one run"),
        (["map", "q", "a.txt", "--json", "--stream"], "exclude each other"),
        (["rank"], "a question is missing"),
        (["rank", "q", "a.txt", "--top", "0"], "top must be at least 1"),
        (["rank", "q", "a.txt", "--mode", "best"], "'--mode'"),
        (["rank", "q", "a.txt", "--strategy", "spans"], "a strategy itself"),
    ],
)
def test_bad_usage(capfd, args, said):
    assert run(args) == 2
    assert said in capfd.readouterr().err


def test_flags_of_rank_reach_the_strategy(api, capfd):
    assert (
        run(["rank", "when?", "a.txt", "b.txt", "--top", "3", "--mode", "listwise", "--by", "passage"]) == 0
    )
    found = api.Context.strategy
    assert (found.name, found.top, found.mode, found.by) == ("rank", 3, "listwise", "passage")
    assert run(["rank", "when?", "a.txt", "--json"]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert Result.model_validate_json(last).command == "rank"
