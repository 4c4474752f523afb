"""One run of many leaves against an endpoint on this machine: time, memory, size on disk, kill -9 and resume.

    python benchmarks/scale.py --leaves 10000 --out benchmarks/results/scale.json

The endpoint is the scripted one of `agentctx.testing_endpoint` and answers each call after 50 ms, so 64 calls
in flight take at least leaves / 64 * 50 ms. A first process runs undisturbed. A second one is killed when
half of the calls are answered, and a third resumes it. Seconds are wall time of the question, with planning
and the first imports; the processor time of the asking process is given beside them, and that of the endpoint
in a process of its own, because both and everybody else on the machine share its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTION = "What is the code of Zed?"
DELAY = 0.05  # seconds that the endpoint takes for a call
CONCURRENCY = 64
LINE = (
    "Line {n} of the log says that the {n}th boat came in "
    "and that nothing else was seen on this day at all.\n\n"
)
FACT = "The code of Zed is K77, as was said at noon by the keeper of the light on the rock in the bay.\n\n"


def text_of(leaves: int) -> str:
    """Two paragraphs a leaf; the fact stands in the last third."""
    lines = [LINE.format(n=f"{n:05}") for n in range(2 * leaves)]
    lines[len(lines) * 2 // 3] = FACT
    return "".join(lines)


def run(home: Path, url: str, leaves: int, *, resume: bool) -> dict[str, Any]:
    """Ask once, in this process, with its memory sampled."""
    from agentctx.api import Context
    from agentctx.memory.types import Document
    from agentctx.paths import Paths
    from agentctx.workflows.strategies.map_reduce import MapReduce

    paths = Paths(*(home / name for name in ("cache", "data", "state", "config")))
    samples: list[float] = []
    ended = threading.Event()
    watch = threading.Thread(target=_sample, args=(samples, ended))
    watch.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        if resume:
            answer = Context.resume("scale", paths=paths)
        else:
            document = Document.of(text_of(leaves), "log.txt")
            ctx = Context.open(
                [document],
                model="openai:scripted",
                base_url=url,
                window=8192,
                concurrency=CONCURRENCY,
                paths=paths,
            )
            answer = ctx.ask(QUESTION, strategy=MapReduce(chunk_tokens=96), run_id="scale")
    finally:
        ended.set()
        watch.join()
    part = len(samples) // 4
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "mib_by_quarter": [round(max(samples[at * part : (at + 1) * part + 1])) for at in range(4)],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "calls": answer.usage.calls,
        "planned_reads": answer.plan.params["reads"],
        "retried": answer.usage.retried,
        "status": answer.status,
        "text": answer.text,
    }


def _sample(samples: list[float], ended: threading.Event) -> None:
    page = resource.getpagesize()
    while True:
        samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20)
        if ended.wait(0.05):
            return


def start(home: Path, url: str, leaves: int, *, resume: bool = False) -> subprocess.Popen[str]:
    """The same in a process of its own, which prints its figures."""
    command = [sys.executable, __file__, "--leaves", str(leaves), "--worker", str(home), "--url", url]
    env = {**os.environ, "AGENTCTX_API_KEY": "none"}
    return subprocess.Popen([*command, *["--resume"] * resume], stdout=subprocess.PIPE, text=True, env=env)


def figures_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the asking process ended with {process.returncode}")
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def sizes(home: Path) -> dict[str, float]:
    """Megabytes of the files that a run leaves, by name."""
    files = [path for path in home.rglob("*") if path.name in ("checkpoints.db", "trace.jsonl", "calls.db")]
    return {path.name: round(path.stat().st_size / 1e6, 2) for path in files}


def measure(leaves: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    from agentctx.testing import finding
    from agentctx.testing_endpoint import ScriptedEndpoint

    with ScriptedEndpoint(finding(r"The code of (\w+ is \w+)"), delay=DELAY) as endpoint:
        served = time.process_time()
        whole = figures_of(start(folder / "whole", endpoint.url, leaves))
        served = time.process_time() - served
        endpoint.finished.clear()
        process = start(folder / "killed", endpoint.url, leaves)
        while len(endpoint.finished) < leaves // 2 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        while endpoint.started > endpoint.ended:
            time.sleep(0.01)
        answered = len(endpoint.finished)
        trace = next((folder / "killed").rglob("trace.jsonl")).read_text(encoding="utf-8")
        received = sum('"event": "call.end"' in line for line in trace.splitlines())
        resumed = figures_of(start(folder / "killed", endpoint.url, leaves, resume=True))
        again = sum(count - 1 for count in Counter(endpoint.finished).values())
    reads = whole["planned_reads"]
    ideal = round(reads / CONCURRENCY * DELAY, 2)
    return {
        "leaves": leaves,
        "ideal_seconds": ideal,
        "times_ideal": round(whole["seconds"] / ideal, 2),
        "cpu_ms_per_leaf": round(1000 * whole["cpu_seconds"] / reads, 2),
        "endpoint_cpu_ms_per_call": round(1000 * served / whole["calls"], 2),
        "whole": whole,
        "megabytes": sizes(folder / "whole"),
        "killed": {
            "answered_before": answered,
            "received_before": received,  # the others were on their way when the process died
            "asked_again": again,
            "resumed": resumed,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(run(given.worker, given.url, given.leaves, resume=given.resume)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(given.leaves, Path(folder))
    result = {
        **figures,
        "concurrency": CONCURRENCY,
        "delay_seconds": DELAY,
        "load_before": round(load, 1),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("langgraph", "langchain-openai", "openai")},
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
