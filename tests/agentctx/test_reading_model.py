"""Readings of the embedded model, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from agentctx.paths import Paths

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEASE = (ROOT / "examples" / "lease.md").read_text(encoding="utf-8")
CHILD = """
    import json, sys
    from dataclasses import asdict
    from agentctx import Engine

    engine = Engine.load("smollm2", offline=True)
    said = []
    for text in json.load(sys.stdin):
        with engine.read(text) as reading:
            replies = [reading.ask(question, max_new_tokens=12) for question in ("Who?", "Where?")]
            said.append([asdict(reading.usage), [asdict(reply) for reply in replies]])
    print(json.dumps([said, asdict(engine.window)]))
"""


def home(embedded: Paths, folder: Path) -> dict[str, str]:
    """A home with the model and the kernels of this user, and nothing read yet."""
    for name in ("models", "kernels"):
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        (folder / "cache" / name).symlink_to(embedded.cache / name)
    return os.environ | {"AGENTCTX_HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def child(env: dict[str, str], texts: list[str]) -> tuple[list[Any], dict[str, Any]]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD)]
    done = subprocess.run(
        command, env=env, input=json.dumps(texts), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said, window = json.loads(done.stdout)
    return said, window


@pytest.mark.model
def test_a_second_process_computes_nothing_and_a_changed_tail_only_the_tail(
    embedded: Paths, tmp_path: Path
) -> None:
    env, text = home(embedded, tmp_path / "home"), LEASE[:2000]
    [[usage, replies]], window = child(env, [text])
    total = usage["prompt_tokens"]
    assert usage["computed_tokens"] == total > 400
    assert window["trained"] == 8192 and window["method"] == "table" and window["reliable"] == 300
    again = child(env, [text, text + " The end.", "Another beginning. " + text])[0]
    assert again[0][0]["computed_tokens"] == 0 and again[0][0]["reused_tokens"] == total
    assert again[0][1] == replies
    assert again[1][0]["reused_tokens"] == total // 64 * 64
    assert again[2][0]["reused_tokens"] == 64  # of what stands before every text
    for reply in replies:
        assert reply["usage"]["reused_tokens"] == total and reply["usage"]["computed_tokens"] < 40


@pytest.mark.model
def test_the_example_of_the_readme_runs(embedded: Paths, tmp_path: Path) -> None:
    (block,) = re.findall(r"## Read once, ask many\n.*?```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", block],
        env=home(embedded, tmp_path / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ tokens read, \d+ computed", lines[0])
    assert len(lines) >= 4
