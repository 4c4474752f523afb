"""The benchmarks of scale in small: their figures, where no clock decides them."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def bench(name, *args, folder):
    out = folder / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(out), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_many_leaves_are_read_once_and_a_killed_run_asks_for_nothing_it_received(tmp_path):
    figures = bench("scale", "--leaves", "300", folder=tmp_path)
    assert figures["whole"]["planned_reads"] == 300
    assert (figures["whole"]["calls"], figures["whole"]["status"]) == (301, "complete")
    killed = figures["killed"]
    assert 150 <= killed["answered_before"] <= 300
    assert killed["asked_again"] <= killed["answered_before"] - killed["received_before"]
    assert killed["resumed"]["text"] == figures["whole"]["text"] == "Zed is K77 [1]"
    assert figures["megabytes"]["checkpoints.db"] < 50 * 300 / 10_000


def test_calls_are_as_many_as_were_planned_where_another_planner_made_29_times_as_many(tmp_path):
    figures = bench("planned", folder=tmp_path)
    assert figures == json.loads((ROOT / "benchmarks/results/planned.json").read_text())
    for row in figures["results"]:
        assert row["calls_made"] <= row["calls_planned"] < figures["other"]["calls_made"] / 20
