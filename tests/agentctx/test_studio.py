"""The graphs that LangGraph's development server is given."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from langgraph.graph import StateGraph

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


async def test_a_graph_runs_with_the_models_of_the_settings(tmp_path, monkeypatch):
    (tmp_path / "hay.txt").write_text("Nothing here. " * 2000 + "The code of Zed is K77.")
    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)\.")) as endpoint:
        settings = {"HOME": tmp_path / "home", "MODEL": "openai:scripted", "BASE_URL": endpoint.url}
        for key, value in {**settings, "API_KEY": "none", "WINDOW": "3000"}.items():
            monkeypatch.setenv(f"AGENTCTX_{key}", str(value))
        given = {"question": "What is the code of Zed?", "sources": [str(tmp_path / "hay.txt")]}
        state = await graph_of("map_reduce").compile().ainvoke(given)
    assert state["answer"]["status"] == "complete"
    assert "Zed is K77" in state["answer"]["text"]
