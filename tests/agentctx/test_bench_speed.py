"""`agentctx bench speed`, on a tiny model: everything is there, and nothing is timed twice."""

import json
from pathlib import Path

from agentctx.bench.timing import compared, interleaved
from agentctx.cli.main import run


def test_turns_are_taken_and_ratios_are_within_a_round():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved(calls, 3, dropped=1, repeat=2)
    assert "".join(order) == "aabb" * 4 and [len(taken) for taken in times.values()] == [3, 3]
    found = compared([10.0, 20.0, 30.0], [20.0, 60.0, 30.0])
    assert (found["ratio"], found["median_us"], found["baseline_us"]) == (2.0, 20, 30)
    assert compared([4.0], [8.0])["ratio"] == 2.0


def test_speed_on_the_tiny_model_and_again(deep_model, tmp_path, capfd):
    """What is there is not timed again; nothing is begun after the time is up."""
    command = ["bench", "speed", "--model", str(deep_model), "--quick", "--dtype", "float32", "--no-plot"]
    command += ["--rounds", "1", "--out", str(tmp_path)]
    assert run([*command, "--max-minutes", "0"]) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["cases"] == 0 and last["unfinished"] == ["1024 tokens", "kv_bytes", "reload", "peak"]
    assert run(command) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    report = json.loads(Path(last["report"]).read_text())
    assert last["unfinished"] == [] and report["missing"]["llama.cpp"]
    names = {(case["operation"], case["options"]["attention"]) for case in report["cases"]}
    assert names == {
        ("prefill", "dense"), ("prefill", "blocktopk-1024"), ("decode", "dense"), ("decode", "quest-1024"),
    }  # fmt: skip
    assert report["kv_bytes"]["float32"] == 2 * report["kv_bytes"]["bfloat16"] == 2 * 4 * 2 * 8 * 4
    assert report["kv_bytes"]["int4"] < report["kv_bytes"]["int8"] < report["kv_bytes"]["bfloat16"]
    assert report["reload"]["tokens"] == 1024 and report["reload"]["bytes"] > 0
    assert report["peak"]["peak_mib"] >= report["peak"]["kv_mib"]
    before = Path(last["report"]).read_bytes()
    assert run(command) == 0 and Path(last["report"]).read_bytes() == before
