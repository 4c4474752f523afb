"""The command line with a scripted API: what is printed where, in which form, with which exit code."""

import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentctx.cli.main import run
from agentctx.memory.types import Budget
from agentctx.result import Result

SCRIPT = Path(__file__).parent / "scripted_api.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A home, a working directory and an environment of its own."""
    for name in [name for name in os.environ if name.startswith("AGENTCTX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("a.txt").write_text("The court ruled on 3 May.\nNobody appealed.\n")


@pytest.fixture
def api(monkeypatch):
    spec = importlib.util.spec_from_file_location("agentctx.api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "agentctx.api", module)
    return module


def shell(*args, **rest):
    """The command line in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), *args]
    rest.setdefault("stdin", subprocess.DEVNULL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | rest
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)


def test_the_kind_of_a_question_and_its_labels_reach_the_run(api, capfd):
    given = ["ask", "heavy?", "a.txt", "--kind", "classify", "--label", "yes", "--label", "no"]
    assert run(given) == 0
    assert capfd.readouterr().out.splitlines()[0] == "classify yes|no: heavy?"
    assert run(["ask", "heavy?", "a.txt", "--kind", "riddle"]) == 2


def test_a_run_is_resumed_within_the_limits_that_are_given(api, capfd):
    assert run(["ask", "--resume", "01RUN"]) == 0
    assert api.Context.resumed_with == Budget()
    assert run(["ask", "--resume", "01RUN", "--max-calls", "7"]) == 0
    assert api.Context.resumed_with == Budget(calls=7)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ask", "when?"], "question"),
        (["summarize", "a.txt"], "paths"),
        (["ask", "--model", "other"], "--model"),
        (["ask", "--window", "500"], "--window"),
        (["ask", "--strategy", "spans"], "--strategy"),
        (["ask", "--dry-run"], "--dry-run"),
        (["ask", "--kind", "aggregate"], "kind"),
        (["summarize", "--per", "file"], "per"),
    ],
)
def test_a_run_is_resumed_as_it_was_asked(api, capfd, args, said):
    """What would be ignored is refused, a dry run that would spend most of all."""
    assert run([*args, "--resume", "01RUN"]) == 2
    assert f"{said} cannot be given" in capfd.readouterr().err


def test_an_answer_is_shown_with_its_citations_and_accounts(api, capfd):
    assert run(["ask", "when?", "a.txt"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "when?",
        "",
        "[1] a.txt",
        "    The court ruled on 3 May.",
        "",
        "read 8 of 8 tokens (100%)",
        "2 of at most 3 calls, 300 of 900 tokens in, 20 of 120 out, 0.5 s; spans with smollm2; run 01RUN",
    ]
    assert err == "warning: the window was not probed (window_uncalibrated)\n"
    assert run(["ask", "when?", "a.txt", "-q"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "    The court ruled on 3 May."


def test_flags_reach_the_api(api, capfd):
    assert run(["ask", "x", "a.txt", "--model", "other", "--window", "500", "--offline", "--ephemeral"]) == 0
    opened = api.Context.opened
    assert (opened["sources"], opened["model"], opened["window"]) == (["a.txt"], "other", 500)
    assert opened["offline"] and opened["ephemeral"]


@pytest.mark.parametrize(
    ("question", "code", "status", "error"),
    [
        ("when?", 0, "complete", None),
        ("unanswerable", 0, "unanswerable", None),
        ("budget", 5, "partial", "budget"),
        ("nothing fits", 5, "failed", "budget"),
        ("down", 6, "failed", "unavailable"),
    ],
)
def test_json_is_one_object_whatever_happens(api, capfd, question, code, status, error):
    assert run(["ask", question, "a.txt", "--json"]) == code
    said = Result.model_validate_json(capfd.readouterr().out)
    assert (said.command, said.status) == ("ask", status)
    assert (said.error and said.error.code) == error


def test_a_spent_budget_shows_the_partial_answer_as_text(api, capfd):
    assert run(["ask", "budget", "a.txt"]) == 5
    out, err = capfd.readouterr()
    assert out.startswith("so far\n") and "error: 3 of 3 calls are spent" in err
    assert "agentctx runs resume 01RUN" in err


def test_errors_take_three_lines_at_most(api, capfd):
    assert run(["ask", "down", "a.txt"]) == 6
    assert capfd.readouterr().err.splitlines() == [
        "error: http://127.0.0.1:1 refused the connection",
        "hint: start it or not",
    ]


@pytest.mark.parametrize("flag", ["--json", "--stream"])
def test_nothing_but_data_reaches_stdout(api, capfd, flag):
    """A library that prints, from Python or from C, must not spoil the object."""
    assert run(["ask", "noise", "a.txt", flag]) == 0
    out, err = capfd.readouterr()
    assert all(json.loads(line)["schema_version"] == 1 for line in out.splitlines())
    assert "from Python" in err and "from C" in err
    print("after")
    assert capfd.readouterr().out == "after\n"  # stdout is whole again


def test_stream_is_json_lines_that_end_with_the_result(api, capfd):
    assert run(["ask", "when?", "a.txt", "--stream"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["event"] for line in lines][3:] == ["token", "call.end", "result"]
    assert {line["run_id"] for line in lines} == {"01RUN"}
    assert Result.model_validate(lines[-1]["result"]).answer == "when?"


def test_stream_ends_with_the_result_of_a_failure(api, capfd):
    assert run(["ask", "down", "a.txt", "--stream"]) == 6
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (last["event"], last["seq"], last["result"]["status"]) == ("result", 6, "failed")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "Usage"),
        (["ask"], 2, "a question is missing"),
        (["ask", "q", "a.txt", "--max-calls", "many"], 2, "'--max-calls'"),
        (["ask", "q", "a.txt", "--max-calls", "0"], 2, "max_calls is 0 (--max-calls)"),
        (["ask", "q", "a.txt", "--no-such-flag"], 2, "--no-such-flag"),
        (["ask", "q", "a.txt", "--json", "--stream"], 2, "exclude each other"),
        (["ask", "q", "a.txt", "--encoding", "x"], 2, "GLOB=NAME"),
        (["ask", "q", "a.txt", "--config", "absent.toml"], 2, "absent.toml cannot be read"),
        (["ask", "q", "a.txt", "--model", "absent"], 6, "no model 'absent'"),
        (["answer", "q"], 2, "No such command 'answer'"),
        (["runs"], 2, "Missing command"),
        (["ask", "q", "absent.txt"], 3, "absent.txt"),
        (["ask", "unsupported", "a.txt", "--require-citations"], 4, ""),
    ],
)
def test_exit_codes(api, capfd, args, code, said):
    assert run(args) == code
    err = capfd.readouterr().err
    assert said in err
    assert len(err.splitlines()) <= 3 or args == []


def test_a_usage_error_is_an_object_too(capfd):
    assert run(["ask", "q", "--json", "--no-such-flag"]) == 2
    said = Result.model_validate_json(capfd.readouterr().out)
    assert (said.status, said.error.code) == ("failed", "usage")


def test_required_citations(api, capfd):
    assert run(["ask", "when?", "a.txt", "--require-citations"]) == 0
    assert run(["ask", "unsupported", "a.txt", "--require-citations"]) == 4
    assert "[1] a.txt  NOT SUPPORTED: not found" in capfd.readouterr().out
    assert run(["ask", "unsupported", "a.txt"]) == 0


def test_a_bad_file_is_skipped_and_named_unless_inputs_are_strict(api, capfd):
    Path("b.bin").write_bytes(b"\0\1\2")
    assert run(["ask", "when?", "a.txt", "b.bin"]) == 0
    out, err = capfd.readouterr()
    assert "warning: b.bin" in err and "(binary)" in err and "1 sources skipped" in out
    assert run(["ask", "when?", "a.txt", "b.bin", "--strict-inputs", "--json"]) == 3
    assert json.loads(capfd.readouterr().out)["error"]["code"] == "binary"


@pytest.mark.parametrize("args", [["plan", "ask", "when?", "a.txt"], ["ask", "when?", "a.txt", "--dry-run"]])
def test_a_dry_run_shows_the_ceiling(api, capfd, args):
    assert run(args) == 0
    assert "at most 3 calls, 900 tokens in, 120 out" in capfd.readouterr().out
    assert run([*args, "--json"]) == 0
    said = Result.model_validate_json(capfd.readouterr().out)
    assert (said.status, said.plan.ceiling.calls, said.answer) == ("planned", 3, None)
    Path("b.bin").write_bytes(b"\0\1\2")
    assert run([*args, "b.bin", "--json"]) == 0
    said = Result.model_validate_json(capfd.readouterr().out)
    assert [(note.code, note.source) for note in said.warnings] == [("binary", "b.bin")]


def test_summaries_and_resumed_runs(api, capfd):
    assert run(["summarize", "a.txt", "--per", "file", "--focus", "rulings", "-q"]) == 0
    assert capfd.readouterr().out.startswith("summary per file of rulings\n")
    assert run(["plan", "summarize", "a.txt", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["command"] == "plan summarize"
    assert run(["runs", "resume", "01X", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["run_id"] == "01X"
    assert run(["ask", "--resume", "01Y", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["run_id"] == "01Y"


def test_a_document_cannot_drive_the_terminal(api, capfd):
    Path("evil.txt").write_text("\x1b]0;owned\x07\x1b[31mred \u202egnihton [link=http://x]y[/link]\n")
    assert run(["ask", "when?", "evil.txt"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "owned" not in out
    assert "red gnihton [link=http://x]y[/link]" in out
    assert run(["ask", "when?", "evil.txt", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["citations"][0]["quote"].startswith("\x1b]0;owned")


def test_piped_input_is_one_document():
    with shell("ask", "when?", "--json", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate(b"From a pipe.\n")
    assert json.loads(out)["citations"][0]["source"] == "<stdin>"
    with shell("ask", "when?", "a.txt", "-", "--json", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate(b"From a pipe.\n")
    assert [c["source"] for c in json.loads(out)["citations"]] == ["a.txt", "<stdin>"]
    with shell("ask", "when?", "--json") as process:
        out, _ = process.communicate()
    assert (process.returncode, json.loads(out)["error"]["code"]) == (3, "empty")


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_with_what_was_found(number, code, reason):
    with shell("ask", "wait", "a.txt", "--json") as process:
        assert process.stderr.readline() == b"ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
    said = Result.model_validate_json(out)
    assert (process.returncode, said.answer, said.stopped_because) == (code, "so far", reason)


def test_a_closed_pipe_is_quiet():
    with shell("ask", "flood", "a.txt", "--stream") as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == b""


def test_a_bug_gives_its_type_and_a_log_but_not_its_message(tmp_path):
    with shell("ask", "bug", "a.txt", "--json") as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert json.loads(out)["error"]["code"] == "internal"
    assert b"TypeError" in err and b"secret" not in out + err and len(err.splitlines()) <= 3
    log = tmp_path / "home" / "state" / "log" / "errors.log"
    assert "the secret of the bug" in log.read_text() and log.stat().st_mode & 0o077 == 0


def test_on_a_terminal_the_directory_is_counted_before_it_is_read():
    ours, theirs = pty.openpty()
    try:
        with shell("ask", "when?", stdin=theirs) as process:
            out, err = process.communicate()
        assert process.returncode == 2 and b"--yes" in err and b"1 files" in err
        with shell("ask", "when?", "--yes", stdin=theirs) as process:
            out, err = process.communicate()
        assert process.returncode == 0 and b"The court ruled" in out and b"reading 1 files" in err
        os.write(ours, b"n\n")
        with shell("ask", "when?", stdin=theirs, stderr=theirs) as process:
            process.communicate()
        assert process.returncode == 2
    finally:
        os.close(ours)
        os.close(theirs)


def test_colour_is_for_terminals_and_never_markup():
    Path("a.txt").write_text("[bold]not markup[/bold]\n")
    ours, theirs = pty.openpty()
    with shell("ask", "when?", "a.txt", stdout=theirs) as process:
        process.communicate()
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the other end is closed and all is read
            break
    os.close(ours)
    assert b"\x1b[36m[1] a.txt" in said and b"[bold]not markup[/bold]" in said
