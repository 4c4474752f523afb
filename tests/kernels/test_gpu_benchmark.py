"""The GPU benchmark runs to its end without a GPU, and checks every operation that Triton implements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from agentctx.kernels.choose import OPERATIONS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"
FIELDS = {"row", "shape", "dtype", "options", "impl", "baseline", "median_us", "p10_us", "p90_us"}
FIELDS |= {"roofline_us", "roofline_share", "max_error"}


def in_triton(operation: str, file: str) -> bool:
    module = f"agentctx.kernels.gpu.{file}"
    return find_spec(module) is not None and hasattr(import_module(module), operation)


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["dry"] is True and file.name.endswith("-dry-kernels.json")
    checked = {check["operation"].partition(" ")[0] for check in found["checks"] if "error" in check}
    assert checked == {name for name, file in OPERATIONS.items() if in_triton(name, file)}
    cases = found["cases"]
    assert len({case["row"] for case in cases}) == 14
    assert all(case.keys() >= FIELDS and "reason" not in case for case in cases), cases
    assert {case["baseline"] for case in cases} == {"roofline", "dense_decode", "bfloat16"}
    assert all(case["ratio"] > 0 for case in cases if case["baseline"] != "roofline")
    assert all("a dry run compares with nothing" in skipped["reason"] for skipped in found["skipped"])


def test_what_is_wrong_is_said() -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT), "--dry", "--minutes"], capture_output=True, text=True)
    assert ran.returncode == 2 and "expected one argument" in ran.stderr
