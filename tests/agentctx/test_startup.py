"""`--help` and completion answer at once because they load nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = [
    "torch",
    "transformers",
    "triton",
    "numpy",
    "faiss",
    "langgraph",
    "langchain_core",
    "openai",
    "xgrammar",
    "pydantic_settings",
]
PROBE = f"""
import sys
from agentctx.cli.main import run
code = run(sys.argv[1:])
loaded = [name for name in {HEAVY} if name in sys.modules]
print(loaded, file=sys.stderr)
sys.exit(code)
"""


def probe(*args: str, **variables: str) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *args], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr.strip()


@pytest.mark.parametrize(
    "args", ["--help", "--version", "ask --help", "plan ask --help", "models --help", "paths"]
)
def test_help_loads_nothing_heavy(args: str, tmp_path: Path) -> None:
    code, out, err = probe(*args.split(), AGENTCTX_HOME=str(tmp_path))
    assert (code, err) == (0, "[]")
    assert out


def test_completion_loads_nothing_heavy() -> None:
    """Completion ends the process itself, so what it loads is read from the interpreter's own report."""
    variables = {"_AGENTCTX_COMPLETE": "complete_bash", "COMP_WORDS": "agentctx su", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", PROBE],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert done.stdout.split() == ["summarize"]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded and not loaded.intersection(HEAVY)


def test_a_plain_model_answers_without_transformers(tiny_model: Path) -> None:
    """It takes a third of the time in which a command should have begun."""
    code = """
import sys
from agentctx.models.load import open_model
from agentctx.paths import Paths
model = open_model(sys.argv[1], paths=Paths.default(), kv_bytes=0)
model.counter.count_text("x")
print(model.chat.invoke("Which court ruled?", max_tokens=3).usage_metadata["output_tokens"])
print([name for name in ("transformers", "langgraph", "openai", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split("\n")[1:2] == ["[]"], done.stdout + done.stderr


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentctx", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("agentctx ")
