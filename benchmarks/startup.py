"""How long a person waits: `--help`, the warm load of the embedded model, one `ask` over 100 pages.

    python benchmarks/startup.py DOCUMENT --out benchmarks/results/startup.json

Each is a process started several times; seconds are wall time, memory is the peak resident size. `warm_load`
ends when the model can be asked; `imports_of_warm_load` is what torch and the tokenizer take of it. Both are
also given as the time that processors worked on them, of all threads, which others on the machine change
less. The document is cut to 300,000 characters, about 100 pages, and asked without any cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOAD = """
from agentctx.cli.startup import collector_resting
with collector_resting():
    from agentctx.models.load import open_model
    from agentctx.paths import Paths
    open_model("smollm2", paths=Paths.default())
import time
print(time.process_time(), flush=True)
"""
IMPORTS = """
import gc
gc.disable()
import torch
import tokenizers
import time
print(time.process_time(), flush=True)
"""
PAGES = 300_000  # characters


def timed(command: list[str], runs: int, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Seconds of each run of a command, and the largest peak memory of any child so far."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **(env or {})})
        seconds.append(round(time.perf_counter() - start, 3))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return {"seconds": seconds, "median": statistics.median(seconds), "peak_mib_so_far": peak}


def until_ready(code: str, runs: int) -> dict[str, Any]:
    """Seconds from the start of a process until it prints a line: those that it computed."""
    seconds, computed = [], []
    for _ in range(runs):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            computed.append(round(float(process.stdout.readline()), 3))
            seconds.append(round(time.perf_counter() - start, 3))
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "cpu_seconds": computed,
        "cpu_median": statistics.median(computed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--question", default="What must a maintainer script do when it is called twice?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    options = parser.parse_args()
    agentctx = [sys.executable, "-m", "agentctx"]
    result: dict[str, Any] = {
        "help": timed([*agentctx, "--help"], options.runs),
        "interpreter": timed([sys.executable, "-c", ""], options.runs),
        "warm_load": until_ready(LOAD, options.runs),
        "imports_of_warm_load": until_ready(IMPORTS, options.runs),
    }
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages.txt"
        pages.write_text(options.document.read_text(errors="replace")[:PAGES])
        ask = [*agentctx, "ask", options.question, str(pages), "--ephemeral", "--json"]
        result["ask_100_pages"] = timed(ask, 3)
        said = json.loads(subprocess.run(ask, check=True, capture_output=True).stdout)
    result["ask_100_pages"] |= {
        "tokens_of_the_document": said["coverage"]["total"],
        "usage": said["usage"],
        "ceiling": said["plan"]["ceiling"],
        "answer": said["answer"],
    }
    load = [round(x, 2) for x in os.getloadavg()]
    result |= {
        "command": "python benchmarks/startup.py DOCUMENT",
        "versions": {name: version(name) for name in ("torch", "transformers", "langgraph", "typer")},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average_at_end": load,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
