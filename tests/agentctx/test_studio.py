"""The graphs that LangGraph's development server is given."""

import asyncio
import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import StateGraph

from agentctx.memory.errors import ModelError, WorkspaceError
from agentctx.models.load import open_model
from agentctx.testing import finding
from agentctx.testing_endpoint import ScriptedEndpoint
from agentctx.workflows.registry import STRATEGIES

ROOT = Path(__file__).parents[2]
GRAPHS = json.loads((ROOT / "langgraph.json").read_text())["graphs"]


def graph_of(name):
    path, _, attribute = GRAPHS[name].partition(":")
    return getattr(import_module(path.removeprefix("./").removesuffix(".py").replace("/", ".")), attribute)()


def test_every_strategy_is_there():
    assert sorted(GRAPHS) == sorted(STRATEGIES)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_factory_gives_a_graph_that_shows_its_inside(name):
    graph = graph_of(name)
    assert isinstance(graph, StateGraph)
    compiled = graph.compile()
    assert set(compiled.get_input_jsonschema()["properties"]) == {"question", "sources"}
    assert "verify" in compiled.get_graph(xray=True).draw_mermaid()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Asks a graph about sources, with the settings' model, in a server that was started in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        values = {"HOME": tmp_path / "home", "MODEL": "openai:scripted", "BASE_URL": endpoint.url}
        for key, value in {**values, "API_KEY": "none", "WINDOW": "3000"}.items():
            monkeypatch.setenv(f"AGENTCTX_{key}", str(value))

        async def ask(*sources, name="map_reduce", **compiled):
            graph = graph_of(name).compile(**compiled)
            given = {"question": "What is the code of Zed?", "sources": [str(source) for source in sources]}
            config = {"configurable": {"thread_id": "the server's"}}
            return (await graph.ainvoke(given, config))["answer"]

        yield ask


def hay(folder, name="hay.txt"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Nothing here. " * 2000 + "The code of Zed is K77.")
    return path


@pytest.mark.parametrize("saver", [None, InMemorySaver()])
async def test_a_graph_runs_with_the_models_of_the_settings(asked, tmp_path, saver):
    answer = await asked(hay(tmp_path), "absent.txt", checkpointer=saver)
    assert (answer["status"], answer["text"]) == ("complete", "Zed is K77 [1]")
    assert [notice["source"] for notice in answer["coverage"]["skipped"]] == ["absent.txt"]


async def test_a_model_that_cannot_be_reached_is_an_error_and_no_answer(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTCTX_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr("agentctx.workflows.send._pause", lambda run, seconds: asyncio.sleep(0))
    with pytest.raises(ModelError):
        await asked(hay(tmp_path))


async def test_a_limit_of_the_settings_gives_the_part_that_it_paid_for(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTCTX_MAX_CALLS", "3")
    answer = await asked(hay(tmp_path))
    assert (answer["status"], answer["usage"]["calls"] <= 3) == ("partial", True)
    assert answer["stopped_because"]


@pytest.mark.parametrize("source", ["../secret.txt", "link.txt", "..", "/", "a\0b"])
async def test_what_lies_outside_of_the_servers_directory_is_not_read(asked, tmp_path, monkeypatch, source):
    inside = hay(tmp_path, "inside/hay.txt")
    secret = hay(tmp_path, "secret.txt")
    (tmp_path / "inside" / "link.txt").symlink_to(secret)
    monkeypatch.chdir(inside.parent)
    with pytest.raises(WorkspaceError):
        await asked("hay.txt", source)
    monkeypatch.setenv("AGENTCTX_ROOTS", os.pathsep.join(["absent", str(tmp_path)]))
    if source.endswith(".txt"):
        assert (await asked(source))["status"] == "complete"


async def test_one_model_serves_all_questions_and_graphs(asked, tmp_path, monkeypatch):
    opened = []

    def counted(*args, **options):
        opened.append(args)
        return open_model(*args, **options)

    monkeypatch.setattr("agentctx.studio.open_model", counted)
    path = hay(tmp_path)
    for name in ("map_reduce", "map_reduce", "lexical"):
        assert (await asked(path, name=name))["status"] == "complete"
    assert len(opened) == 1
