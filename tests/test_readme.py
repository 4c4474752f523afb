"""The README cannot rot: its Python runs, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_is_about_ten_lines() -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]  # tests/agentctx runs the second
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    compile(block, "README.md", "exec")


@pytest.mark.model
def test_the_python_runs_and_finds_the_answer() -> None:
    """In a process of its own, from the root, as a reader would paste it."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]  # tests/agentctx runs the second
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("at most ")
    assert "supported: lease.md" in done.stdout.replace("examples/", "") and "five months" in done.stdout


def test_the_figures_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/table.py", "--check"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`((?:agentctx|workflows|memory|kernels|benchmarks)/[\w./]+\.\w+)`", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_method_table_is_that_of_the_registry() -> None:
    from agentctx.workflows.registry import STRATEGIES

    rows = re.findall(r"^\| `(\w+)` \|.*`workflows/strategies/\w+\.py` \|$", README, re.MULTILINE)
    assert sorted(rows) == sorted(STRATEGIES)


def test_the_table_of_kinds_is_that_of_the_tasks() -> None:
    from agentctx.workflows.tasks.table import KINDS

    rows = re.findall(r"^\| `(\w+)`[^|]*\|.*`workflows/tasks/(\w+)\.py` \|$", README, re.MULTILINE)
    assert dict(rows) == {name: place.partition(":")[0] for name, place in KINDS.items()}


def test_the_attention_table_is_that_of_the_methods() -> None:
    from agentctx.runtime.methods.table import EVICTORS, METHODS

    rows = re.findall(r"^\| `(\w+)` \|.*`agentctx/runtime/methods/(\w+)\.py` \|$", README, re.MULTILINE)
    assert dict(rows) == {name: place.partition(":")[0] for name, place in {**METHODS, **EVICTORS}.items()}
