"""How a kernel is measured: candidates and baseline in turns, in one process, on data that no cache holds.

A round calls each of them on the next of several input sets; the sets together are larger than the last-level
cache, and the baseline, which reads everything, always comes between two turns of a candidate. Nine rounds
count, after two that do not; five or three after one where a round takes seconds, or the whole would take an
hour. The ratio is the median of the ratios within a round. One thread is timed
by its own clock, which a busy machine does not disturb, more threads by the wall. Answers are compared before
anything is timed. The even rounds of a candidate against its odd rounds are the same code twice: that
difference is the noise.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentctx.kernels.cpu import build
from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.roofline import Cost

RESULTS = Path(__file__).resolve().parent.parent / "results"
# Rounds, those of them that are dropped, and how many seconds a round may take for it.
ROUNDS = ((11, 2, 3.0), (6, 1, 12.0), (4, 1, math.inf))
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative distance from the float64 answer
Call = Callable[[int], object]


@dataclass(frozen=True)
class Bench:
    """What every benchmark is given: the options, and what the machine can do."""

    threads: int
    quick: bool
    flex: bool
    read: float  # bytes/s
    copy: float  # bytes/s, read and written
    flop: dict[torch.dtype, float]  # FLOP/s of a large product

    @classmethod
    def here(cls, threads: int, *, quick: bool = False, flex: bool = False) -> Bench:
        """Measure the ceilings; uses as many threads as the benchmark will."""
        torch.set_num_threads(threads)
        source = torch.randn(2 ** (24 if quick else 26))  # 256 MB
        target = torch.empty_like(source)
        times = interleaved(
            {"read": lambda _: source.sum(), "copy": lambda _: target.copy_(source)}, threads=threads
        )
        size = source.nbytes
        read, copy = (size * n / (min(times[name]) * 1e-6) for name, n in (("read", 1), ("copy", 2)))
        rates = {dtype: _product_rate(dtype, threads) for dtype in (torch.float32, torch.bfloat16)}
        return cls(threads, quick, flex, read, copy, rates)

    def sets(self, bytes_of_one: float, most: int = 64) -> int:
        """Input sets that together exceed the last-level cache, at least three."""
        return min(most, max(3, math.ceil(1.3 * last_level_cache() / bytes_of_one)))

    def us(self, cost: Cost, dtype: torch.dtype) -> float:
        """The roofline of a call in microseconds."""
        return cost.us(self.read, self.flop[dtype])


def _product_rate(dtype: torch.dtype, threads: int) -> float:
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    times = interleaved({"product": lambda _: a @ b}, threads=threads)
    return 2 * 1024**3 / (min(times["product"]) * 1e-6)


def interleaved(
    calls: dict[str, Call], *, threads: int, sets: int = 1, batch: int = 1, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Microseconds a call took in each round that counts; `batch` calls a round, on the next of the sets.

    Rounds go on for `seconds` if the fewest are done before.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    began, done = time.perf_counter(), 0
    wanted, dropped, _ = ROUNDS[0]
    while done < wanted or (time.perf_counter() - began < seconds and done < 40):
        for name, call in calls.items():
            start = clock()
            for i in range(done * batch, (done + 1) * batch):
                call(i % sets)
            times[name].append((clock() - start) / batch * 1e6)
        done += 1
        if done == 1:
            took = sum(taken[0] for taken in times.values()) * batch * 1e-6
            wanted, dropped, _ = next(rule for rule in ROUNDS if took <= rule[2])
    gc.enable()
    return {name: taken[dropped:] for name, taken in times.items()}


@dataclass(frozen=True)
class Candidate:
    """One way to compute an answer. `check` returns the answer of set 0 and the float64 answer to it."""

    name: str  # unique in its comparison
    impl: str
    baselines: tuple[str, ...]  # one record for each
    call: Call
    check: Callable[[], tuple[Tensor, Tensor]]
    cost: Cost
    options: dict[str, Any]


def compare(
    bench: Bench,
    shape: dict[str, int],
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    baselines: dict[str, Call],
    *,
    sets: int,
    batch: int,
    seconds: float = 2.0,
) -> list[dict[str, Any]]:
    """Check the candidates, time those that are right in turns with the baselines; a record for each pair."""
    errors, reasons = {}, {}
    for each in candidates:
        try:
            got, want = each.check()
        except KernelUnavailable as error:
            reasons[each.name] = str(error)
            continue
        far = (got.double() - want.double()).norm() / want.double().norm()
        if not far <= ALLOWED[dtype]:
            reasons[each.name] = f"wrong: {float(far):.1e} away from the float64 answer"
            continue
        errors[each.name] = float((got.double() - want.double()).abs().max())
    calls = {each.name: each.call for each in candidates if each.name in errors} | baselines
    for call in calls.values():
        call(0)
    times = interleaved(calls, threads=bench.threads, sets=sets, batch=batch, seconds=seconds)
    records = []
    for each, baseline in ((one, other) for one in candidates for other in one.baselines):
        record: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        record |= {"options": each.options, "impl": each.impl, "baseline": baseline}
        if each.name in errors:
            record |= _figures(times[each.name], times[baseline], bench.us(each.cost, dtype))
            record["max_error"] = errors[each.name]
        else:
            record["reason"] = reasons[each.name]
        records.append(record)
        print(line(record), flush=True)
    return records


def _figures(own: list[float], other: list[float], roof: float) -> dict[str, float]:
    median = statistics.median(own)
    low, *_, high = statistics.quantiles(own, n=10, method="inclusive")
    ratio = statistics.median(b / a for a, b in zip(own, other, strict=True))
    return {
        "median_us": round(median, 2),
        "p10_us": round(low, 2),
        "p90_us": round(high, 2),
        "baseline_us": round(statistics.median(other), 2),
        "ratio": round(ratio, 3),
        "roofline_us": round(roof, 2),
        "roofline_share": round(roof / median, 3),
        "rounds": len(own),
        "noise": round(abs(statistics.median(own[::2]) / statistics.median(own[1::2]) - 1), 3),
    }


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    what = " ".join(f"{value}" for value in record["options"].values())
    name = f"  {record['shape'].get('tokens', '')} {record['dtype']} {what} {record['impl']}"
    if "reason" in record:
        return f"{name}: {record['reason']}"
    return (
        f"{name}: {record['median_us']:.0f} us [{record['p10_us']:.0f}, {record['p90_us']:.0f}], "
        f"{record['ratio']:.2f}x {record['baseline']}, {record['roofline_share']:.0%} of the roofline, "
        f"noise {record['noise']:.1%}"
    )


def write(operation: str, bench: Bench, cases: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write the results of one operation, with all that is known of the machine."""
    known = {
        "date": date.today().isoformat(),
        "commit": _said(["git", "describe", "--always", "--dirty"]),
        "device": device() | ceilings(bench),
        "versions": versions(),
        "threads": bench.threads,
        "cases": cases,
    }
    slug = "-".join(known["device"]["name"].lower().split()[:3])
    path = folder / f"{known['date']}-{slug}-{bench.threads}t-{operation}.json"
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def device() -> dict[str, Any]:
    """The processor, the features that matter here, and how busy it is."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in row.split(":", 1))
        for row in info.split("\n\n")[0].splitlines()
        if ":" in row
    )
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "level": build.best(),
        "cores": os.cpu_count(),
        "last_level_cache": last_level_cache(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def ceilings(bench: Bench) -> dict[str, float]:
    """What was measured in the same run, as it stands in the results."""
    rates = {f"gflop_s_{str(dtype).removeprefix('torch.')}": rate / 1e9 for dtype, rate in bench.flop.items()}
    all_of_it = {"read_gb_s": bench.read / 1e9, "copy_gb_s": bench.copy / 1e9, **rates}
    return {name: round(value, 1) for name, value in all_of_it.items()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "not installed"
    tool = build.compiler()
    found["compiler"] = _said([*tool, "--version"]) if tool else "none"
    return found


def last_level_cache() -> int:
    """Bytes; 32 MB where the system does not tell."""
    sizes = [os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE",) if name in os.sysconf_names]
    return max(sizes, default=0) or 32 * 2**20


def _said(command: list[str]) -> str:
    here = Path(__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.partition("\n")[0]
