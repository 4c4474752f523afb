"""`agentctx bench`: cells, tasks, resuming, and what a grid says of `auto`."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.bench import fidelity, grid, tasks
from agentctx.bench.cells import cells, described, parse_budgets, parse_lengths, parse_methods
from agentctx.bench.choice import chosen
from agentctx.bench.declared import declared
from agentctx.bench.peers import Place
from agentctx.bench.texts import collect
from agentctx.cli.main import run
from agentctx.memory.errors import ConfigError, InputError, StoreError
from agentctx.models.load import open_model
from agentctx.models.table import TABLE
from agentctx.paths import Paths
from agentctx.runtime.methods.auto import automatic
from agentctx.runtime.methods.table import ANCHORS, EVICTING_ANCHORS, EVICTORS, METHODS, method

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(deep_model):
    return Place.find(str(deep_model), Paths.default()).load()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Two folders with a long text each, and a short one."""
    folder = tmp_path_factory.mktemp("book")
    for name in ("a", "b"):
        (folder / name).mkdir()
        words = random.Random(name).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=600)
        (folder / name / "long.txt").write_text(" ".join(words))
        (folder / name / "short.txt").write_text("short")
    return folder


def test_a_length_is_measured_once_and_a_killed_run_goes_on(weights, book, tmp_path):
    path = tmp_path / "grid.json"
    plan = grid.Plan(["random", "quest"], [512], [1024], ("agreement",), [book], 1)
    said: list[str] = []

    def kill(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.run(weights, plan, path, kill)
    half = json.loads(path.read_text())["cells"]
    assert [cell["method"] for cell in half] == ["dense", "random"]
    whole = grid.run(weights, plan, path, said.append)
    assert whole["cells"][:2] == half and len(whole["cells"]) == len(said) == 3
    assert grid.run(weights, plan, path, said.append)["cells"] == whole["cells"] and len(said) == 3
    assert json.loads(path.read_text()) == whole
    other = grid.run(weights, replace(plan, texts=2), path, said.append)
    assert len(other["cells"]) == 6, "other texts are other cells"


def test_dense_agrees_with_itself_and_a_part_does_not(weights, book, tmp_path):
    plan = grid.Plan(["random", "quest", "streaming"], [512], [1024], data=[book], texts=1, items=1)
    found = grid.run(weights, plan, tmp_path / "grid.json", lambda line: None)
    dense, *others = found["cells"]
    assert dense["agreement"]["mean"] == 1.0 and dense["kl"]["mean"] < 1e-9 and dense["nll_rise"]["mean"] == 0
    assert dense["texts"][0]["positions"] == 255, "the last quarter, each but the last with a next token"
    for cell in others:
        assert cell["kl"]["mean"] > dense["kl"]["mean"], cell["attention"]
        assert cell["kl"]["low"] <= cell["kl"]["mean"] <= cell["kl"]["high"]
    quest = next(cell for cell in others if cell["method"] == "quest")
    assert 0 <= quest["bracket"]["low"] <= quest["bracket"]["high"] <= quest["bracket"]["worst"] <= 1


def test_a_full_budget_is_dense(weights, book, tmp_path):
    plan = grid.Plan(["quest", "streaming", "blocktopk"], [None], [640], ("agreement",), [book], 1)
    for cell in grid.run(weights, plan, tmp_path / "grid.json", lambda line: None)["cells"]:
        assert cell["kl"]["mean"] < 1e-6, cell["attention"]


def test_the_figures_are_those_of_the_definition(weights, book):
    """By one forward pass of the whole text, in float64."""
    (text,) = collect([book], weights.tokenizer, 256, 1)
    subject = fidelity.Subject(weights, "streaming:window=60")
    expected = fidelity.Subject(weights, "dense").expect(text)
    found = subject.agreement(text, expected)
    context = subject.read(text.ids[:192])
    own = weights.engine.logits(subject.ask(context, text.ids[192:])).double().log_softmax(-1)[:-1]
    dense = weights.engine.logits(expected.hidden).double().log_softmax(-1)[:-1]
    assert found.kl == pytest.approx(float((dense.exp() * (dense - own)).sum(-1).mean()), rel=1e-4)
    assert found.agreement == float((own.argmax(-1) == dense.argmax(-1)).double().mean())
    rows = torch.arange(63)
    assert found.nll == pytest.approx(-float(own[rows, torch.tensor(text.ids[193:])].mean()), rel=1e-4)


def test_beyond_the_window_there_are_tasks_only_and_refusals(weights, book, tmp_path):
    plan = grid.Plan(["quest", "streaming"], [512], [2048], data=[book], items=1)
    dense, quest, streaming = grid.run(weights, plan, tmp_path / "grid.json", lambda line: None)["cells"]
    assert "window" in dense["refused"] and "window" in quest["refused"]
    assert len(streaming["tasks"]) == 1 and "agreement" not in streaming


def test_a_budget_that_a_method_refuses_is_a_record(weights, book, tmp_path):
    plan = grid.Plan(["quest"], [256], [512], ("agreement",), [book], 1)
    found = grid.run(weights, plan, tmp_path / "grid.json", lambda line: None)["cells"][1]
    assert "too small" in found["refused"] and "agreement" not in found


def test_bad_data_and_bad_files(weights, book, tmp_path):
    with pytest.raises(InputError, match="no text of 9,000 tokens"):
        collect([book], weights.tokenizer, 9000, 1)
    with pytest.raises(InputError, match="no folder"):
        collect([tmp_path / "absent"], weights.tokenizer, 64, 1)
    path = tmp_path / "grid.json"
    path.write_text("{")
    with pytest.raises(StoreError, match="not a grid"):
        grid.load(path)
    path.write_text('{"schema": 99}')
    with pytest.raises(StoreError, match="version 99"):
        grid.load(path)
    with pytest.raises(ConfigError, match="no task 'poetry'"):
        grid.Plan(["quest"], [512], [1024], ["poetry"])


def test_texts_come_from_every_folder_first(weights, book):
    texts = collect([book], weights.tokenizer, 512, 5)
    assert [Path(text.name).parent.name for text in texts] == ["a", "b"]
    assert all(len(text.ids) == 512 for text in texts)


@pytest.mark.parametrize("name", [*METHODS, *ANCHORS])
def test_every_method_can_be_given_a_budget(name):
    kind = method(described(name, 1024, 4096))
    if hasattr(kind, "budget"):
        assert kind.budget == 1024
    if hasattr(kind, "dense_below"):
        assert kind.dense_below == 0


def test_a_budget_becomes_the_parameter_of_the_method():
    assert described("quest", 1024, 8192) == "quest:budget=1024,dense_below=0"
    assert described("streaming", 1024, 8192) == "streaming:window=1020"
    assert described("triangle", 512, 8192) == "triangle:local=512,dense_below=0"
    assert described("dense", 512, 8192) == "dense"


def test_cells_leave_out_what_would_be_dense():
    found = list(cells(["dense", "quest"], [1024, 4096, None], [2048, 8192]))
    assert [(cell.method, cell.budget, cell.length) for cell in found] == [
        ("dense", None, 2048),
        ("quest", 1024, 2048),
        ("quest", 2048, 2048),
        ("dense", None, 8192),
        ("quest", 1024, 8192),
        ("quest", 4096, 8192),
        ("quest", 8192, 8192),
    ]


def test_lengths_budgets_and_methods_are_read():
    assert parse_lengths("1k..32k") == [1024, 2048, 4096, 8192, 16384, 32768]
    assert parse_lengths("512,8K") == [512, 8192] and parse_budgets("256, full") == [256, None]
    assert set(parse_methods("all")) == {*METHODS, *ANCHORS, *EVICTORS, *EVICTING_ANCHORS}
    for wrong in ("", "0", "many", "-4", "1k..b"):
        with pytest.raises(ConfigError):
            parse_lengths(wrong)
    with pytest.raises(ConfigError, match="no attention method 'magic'"):
        parse_methods("quest,magic")


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.sampled_from([*tasks.MAKERS]), st.integers(300, 3000), st.integers(0, 1000))
def test_made_tasks_hold_their_answers_and_their_length(task, length, seed):
    def words(text: str) -> int:
        return len(text.split())

    item = next(item for item in tasks.made(words, length, 1, seed) if item.task == task)
    text, _, question = item.prompt.rpartition("\n\n")
    assert all(answer in text and answer not in question for answer in item.answers)
    assert length - 12 <= words(item.prompt) <= length
    assert item.score(" and ".join(item.answers)) == 1.0 and item.score("nothing") == 0.0
    assert item == next(item for item in tasks.made(words, length, 1, seed) if item.task == task)


def test_items_of_the_generator_are_taken_where_they_fit(tmp_path):
    rows = [
        {"id": f"{task}-{size}", "task": task, "context": "x " * size, "answer_prefix": "The answer is ",
         "answers": ["One", "two"], "metric": "string_match_all (qa: string_match_part)"}
        for task in ("niah", "qa_2") for size in (100, 900)
    ]  # fmt: skip
    rows.append({"id": "other", "metric": "exact", "context": "x", "task": "other", "answers": []})
    (tmp_path / "ruler.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = tasks.items([tmp_path], lambda text: len(text.split()), 1200, 5)
    assert [item.name for item in found] == ["niah-900", "qa_2-900"]
    assert found[0].prompt.endswith("x The answer is") and found[0].score("one, three") == 0.5
    assert found[1].score("one, three") == 1.0
    assert {item.task for item in tasks.items([tmp_path], lambda text: len(text.split()), 4000, 3)} == {
        *tasks.MAKERS
    }


@pytest.mark.parametrize("line", ["{", "[]", '{"metric": "string_match_all", "context": "x", "task": "vt"}'])
def test_a_damaged_line_of_tasks_is_named(tmp_path, line):
    (tmp_path / "ruler.jsonl").write_text(f'{{"metric": "other"}}\n{line}')
    with pytest.raises(InputError, match="line 2, is no task"):
        tasks.items([tmp_path], len, 100, 1)


def test_intervals_hold_the_mean_and_narrow_for_equal_rows():
    rows = [{"x": value} for value in (0.1, 0.2, 0.9)]
    found = grid.interval(rows, lambda some: some["x"].mean(-1))
    assert found["mean"] == pytest.approx(0.4) and 0.1 <= found["low"] < 0.4 < found["high"] <= 0.9
    same = grid.interval([{"x": 0.5}] * 4, lambda some: some["x"].mean(-1))
    assert same == {"mean": 0.5, "low": 0.5, "high": 0.5}


def cell(attention, length, *, agreement=0.99, rise=0.001, score=0.5, cpu=1.0):
    name = attention.partition(":")[0]
    figures = {"agreement": agreement, "nll_rise": rise, "score": score}
    spread = {key: {"mean": x, "low": x, "high": x} for key, x in figures.items()}
    return {"run": 0, "method": name, "length": length, "attention": attention, "cpu_s": cpu} | spread


def choice(*measured):
    dense = [cell("dense", length, agreement=1.0, rise=0.0, cpu=2.0) for length in (2048, 4096, 8192)]
    run = {"model": "m", "fingerprint": "f"}
    return chosen({"runs": [run], "cells": [*dense, *measured]})["m"]["attention"]


def test_auto_is_the_cheapest_that_qualifies_at_the_long_end():
    quest, mean = "quest:budget=1024,dense_below=0", "mean:budget=1024,dense_below=0"
    assert choice() == "dense"
    assert choice(cell(quest, 8192)) == "quest:budget=1024,dense_below=8192"
    assert choice(cell(quest, 8192), cell(quest, 4096)) == "quest:budget=1024,dense_below=4096"
    assert choice(cell(quest, 8192), cell(quest, 2048)) == "quest:budget=1024,dense_below=8192"
    assert choice(cell(quest, 4096)) == "dense", "not at the longest"
    assert choice(cell(quest, 8192), cell(mean, 8192, cpu=0.5)).startswith("mean")
    assert choice(cell(quest, 8192, cpu=2.1)) == "dense", "dearer than dense"
    for worse in ({"agreement": 0.979}, {"rise": 0.011}, {"score": 0.48}):
        assert choice(cell(quest, 8192, **worse)) == "dense", worse
    assert choice(cell("random:budget=1024,dense_below=0", 8192)) == "dense", "an anchor"
    assert choice(cell("streaming:window=1020", 8192)) == "dense", "cannot be dense below a length"


def test_auto_follows_the_latest_weights_and_the_latest_figures():
    quest = "quest:budget=1024,dense_below=0"
    runs = [{"model": "m", "fingerprint": "old"}, {"model": "m", "fingerprint": "new"}]
    dense = [cell("dense", 8192, cpu=2.0) | {"run": run} for run in (0, 1)]
    old, new = cell(quest, 8192), cell(quest, 8192, agreement=0.5) | {"run": 1}
    assert chosen({"runs": runs, "cells": [*dense, old, new]})["m"]["attention"] == "dense"
    again = cell(quest, 8192) | {"run": 1}
    found = chosen({"runs": runs, "cells": [*dense, old, new, again]})["m"]
    assert found["attention"].startswith("quest") and found["fingerprint"] == "new"


def test_the_methods_are_listed_with_what_they_declare(capsys):
    assert run(["bench", "attention", "--list"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    assert [row["name"] for row in listed] == parse_methods("all")
    assert listed == json.loads(json.dumps(declared(parse_methods("all"))))
    quest = next(row for row in listed if row["name"] == "quest")
    assert quest["budget"] == "budget" and quest["while_asking"] and not quest["changes_what_is_stored"]


def test_a_quick_run_from_the_command_line(deep_model, tmp_path, capfd):
    """Every method, the smallest of everything, and what it leaves behind."""
    command = [
        "bench",
        "attention",
        "--model",
        str(deep_model),
        "--quick",
        "--no-plot",
        "--out",
        str(tmp_path),
    ]
    assert run(command) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    grid_file = json.loads((tmp_path / "grid.json").read_text())
    assert last["cells"] == len(grid_file["cells"]) == len(parse_methods("all"))
    assert {"device", "versions", "fingerprint", "commit"} <= grid_file["runs"][0].keys()
    refused = [cell["method"] for cell in grid_file["cells"] if "refused" in cell]
    assert refused == ["adamas", "selfextend"], "heads of 8 channels, and a window below its own"


def test_real_text_is_asked_for(capsys, tmp_path):
    assert run(["bench", "attention", "--no-plot", "--out", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("agentctx.bench.plot.find_spec", lambda name: None)
    assert run(["bench", "attention", "--quick", "--out", str(tmp_path)]) == 2
    assert "--no-plot" in capsys.readouterr().err and not list(tmp_path.iterdir())


RESULTS = ROOT / "benchmarks/results/grid.json"
AUTO = json.loads((ROOT / "agentctx/runtime/methods/auto.json").read_text())


def test_the_shipped_table_is_the_one_that_the_committed_grid_gives():
    assert chosen(grid.load(RESULTS)) == AUTO
    assert AUTO.keys() <= TABLE.keys(), "only models that are known by their hash"


def test_auto_is_read_from_the_table_and_dense_where_nothing_was_measured(monkeypatch):
    for name, row in AUTO.items():
        assert automatic(name) == row["attention"]
        method(automatic(name))  # can be made
    assert automatic("something else") == "dense"


def test_in_the_committed_grid_random_loses():
    """To every method that also chooses whole blocks for each query."""
    cells = [cell for cell in grid.load(RESULTS)["cells"] if "kl" in cell]
    lost = [cell for cell in cells if cell["method"] == "random"]
    assert lost
    for bad in lost:
        same = [c for c in cells if (c["budget"], c["length"]) == (bad["budget"], bad["length"])]
        for good in same:
            if good["method"] in ("quest", "mean", "adamas"):
                assert good["kl"]["mean"] < bad["kl"]["mean"], (good["attention"], good["length"])


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from agentctx.bench import plot

    ways = ["quest:budget=1024,dense_below=0", "random:budget=1024,dense_below=0"]
    measured = [cell(way, length) | {"budget": 1024} for way in ways for length in (2048, 4096)]
    plot.grid({"cells": measured}, tmp_path / "new" / "grid.png")
    case = {
        "shape": {"tokens": 1024}, "options": {"attention": "dense", "linears": "bf16"},
        "baseline": "transformers", "median_us": 10, "baseline_us": 20,
    }  # fmt: skip
    report = {"cases": [case | {"operation": operation} for operation in ("prefill", "decode")]}
    plot.speed(report, tmp_path / "speed.png")
    for path in (tmp_path / "new" / "grid.png", tmp_path / "speed.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.model
def test_a_model_of_the_table_attends_as_the_table_says(embedded, monkeypatch):
    said = {"smollm2": "quest:budget=1024,dense_below=4096"}
    monkeypatch.setattr("agentctx.models.load.automatic", said.__getitem__)
    chosen_for_it = open_model("smollm2", paths=embedded, kv_bytes=0)
    assert chosen_for_it.chat.weights.engine.method == method(said["smollm2"])
    asked_for = open_model("smollm2", paths=embedded, attention="dense", kv_bytes=0)
    assert asked_for.chat.weights.engine.method == method("dense")
