"""How a GPU kernel is measured: candidates and baselines in turns, in one process, on inputs no cache holds.

A round calls each of them once on every one of several input sets, which together are larger than the
second-level cache; what takes less than a launch costs is recorded as a CUDA graph and replayed. Events time
the rounds. Nine count, after two that do not. The ratio is the median of the ratios within a round, and the
ceilings (copies, a product of matrices) come from the same run. Answers are compared before anything is
timed, and what is wrong is not timed. The even rounds of a candidate against its odd rounds are the same code
twice: that difference is the noise.

Nothing begins that would end past the deadline, and what did not run stands in the results with the reason.
In dry mode the same code runs once, on a CPU in Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from agentctx.kernels.gpu.graph import captured
from agentctx.kernels.roofline import Cost

ROUNDS, DROPPED = 11, 2
LONG = 4.0  # seconds that the rounds of one comparison may take
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative distance from the answer in float32
PEERS = (
    *("transformers", "fla-core", "flash-linear-attention", "flashinfer-python", "sageattention"),
    *("hip-attn", "native-sparse-attention-pytorch", "einops"),
)
# What may go wrong in a peer, a compiler or a driver without ending the run.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError)
FAILURES += (AssertionError, NotImplementedError, TritonError)
Call = Callable[[int], object]
Turn = Callable[[], object]
Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a candidate must and should reach against a baseline: a ratio, or a share of the roofline."""

    must: float
    should: float


@dataclass(frozen=True)
class Candidate:
    """One way to compute an answer. `check` returns the answer of set 0 and the right one.

    `targets`: what is wanted against a baseline, by its name, "best" (the fastest baseline) or "roofline".
    """

    options: Record
    call: Call
    check: Callable[[], tuple[Tensor, Tensor]]
    cost: Cost
    targets: dict[str, Target] = field(default_factory=dict)
    impl: str = "triton"


@dataclass
class Bench:
    """The device, its ceilings, the time that is left, and what was found."""

    dry: bool
    deadline: float
    copy: float = 1e9  # bytes/s, read and written
    product: float = 1e9  # FLOP/s of a large bfloat16 product
    cases: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def ceilings(self) -> None:
        """Measure copies of 1 GiB and products of 8192 x 8192."""
        size, n = (2**12, 64) if self.dry else (2**29, 8192)
        source = torch.randn(size, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        times = self.rounds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
        self.copy = 2 * source.nbytes / (statistics.median(times["copy"]) * 1e-6)
        self.product = 2 * n**3 / (statistics.median(times["product"]) * 1e-6)

    def attempt(self, name: str, seconds: float, call: Callable[[], Iterable[Record]]) -> None:
        """Add the records of `call`, if `seconds` are left and it does not fail; or the reason why not."""
        if self.left() < seconds:
            self.skip(name, f"{seconds:.0f} s are needed, {max(self.left(), 0):.0f} s were left")
            return
        began = time.perf_counter()
        try:
            for record in call():
                self.cases.append({"row": name, **record})
                print(line(self.cases[-1]), flush=True)
        except FAILURES as error:
            self.skip(name, reason(error))
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        if not self.dry:
            torch.cuda.empty_cache()

    def skip(self, name: str, why: str) -> None:
        print(f"{name}: {why}", flush=True)
        self.skipped.append({"row": name, "reason": why})

    def compare(
        self,
        shape: Record,
        candidates: list[Candidate],
        baselines: dict[str, Call],
        *,
        sets: int,
        dtype: torch.dtype = torch.bfloat16,
        graph: bool = True,
    ) -> Iterable[Record]:
        """Check the candidates, time those that are right in turns with the baselines that run."""
        broken: dict[str, str] = {}
        turns: dict[str, Turn] = {}
        errors: dict[str, float] = {}
        for i, each in enumerate(candidates):
            try:
                errors[f"{i}"] = checked(*each.check(), ALLOWED[dtype])
                turns[f"{i}"] = self.turn(each.call, sets, graph)
            except FAILURES as error:
                broken[f"{i}"] = reason(error)
        for name, call in baselines.items():
            try:
                turns[name] = self.turn(call, sets, graph)
            except FAILURES as error:
                broken[name] = reason(error)
        times = {name: [x / sets for x in taken] for name, taken in self.rounds(turns).items()}
        rest = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        for name in baselines:
            if name in broken:
                yield {**rest, "impl": name, "reason": broken[name]}
        for i, each in enumerate(candidates):
            own = {**rest, "options": each.options, "impl": each.impl}
            if f"{i}" in broken:
                yield {**own, "reason": broken[f"{i}"]}
                continue
            own |= {"max_error": errors[f"{i}"], "graph": graph and not self.dry}
            for record in self.against(each, times[f"{i}"], {n: times[n] for n in baselines if n in times}):
                yield own | record

    def against(
        self, each: Candidate, own: list[float], baselines: dict[str, list[float]]
    ) -> Iterable[Record]:
        """A record for the roofline, for each baseline, and for the fastest of them if that has a target."""
        roof = each.cost.us(self.copy, self.product)
        share = roof / statistics.median(own)
        figures = spread(own) | {"roofline_us": round(roof, 2), "roofline_share": round(share, 3)}
        yield figures | {"baseline": "roofline"} | verdict(each.targets.get("roofline"), share)
        others = list(baselines.items())
        if others and "best" in each.targets:
            name, times = min(others, key=lambda pair: statistics.median(pair[1]))
            others.append((f"best ({name})", times))
        for name, times in others:
            ratio = statistics.median(b / a for a, b in zip(own, times, strict=True))
            found = {"baseline": name, "baseline_us": round(statistics.median(times), 2)}
            wanted = each.targets.get("best" if name.startswith("best (") else name)
            yield figures | found | {"ratio": round(ratio, 3)} | verdict(wanted, ratio)

    def turn(self, call: Call, sets: int, graph: bool) -> Turn:
        """`call` on each of the sets, once it has run; as a graph if wanted."""

        def all_sets() -> None:
            for i in range(sets):
                call(i)

        if graph and not self.dry:
            return captured(all_sets)
        call(0)
        if not self.dry:
            torch.cuda.synchronize()
        return all_sets

    def rounds(self, turns: dict[str, Turn]) -> dict[str, list[float]]:
        """Microseconds a turn took in each round that counts."""
        repeats = {name: self._repeats(turn) for name, turn in turns.items()}
        times: dict[str, list[float]] = {name: [] for name in turns}
        rounds, began, done = (1 if self.dry else ROUNDS), time.perf_counter(), 0
        while done < rounds and (done < 4 or time.perf_counter() - began < LONG):
            for name, turn in turns.items():
                times[name].append(self._timed(turn, repeats[name]))
            done += 1
        dropped = 0 if self.dry else DROPPED if done == ROUNDS else 1
        return {name: taken[dropped:] for name, taken in times.items()}

    def _repeats(self, turn: Turn) -> int:
        """So many turns that they take two milliseconds."""
        if self.dry:
            return 1
        turn()
        return max(1, min(1000, math.ceil(2000 / self._timed(turn, 1))))

    def _timed(self, turn: Turn, repeats: int) -> float:
        """Microseconds of one turn."""
        if self.dry:
            began = time.perf_counter()
            turn()
            return (time.perf_counter() - began) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            turn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / repeats

    def write(self, folder: Path, checks: list[Record]) -> Path:
        """Write what was found, with all that is known of the machine."""
        known = {
            "date": date.today().isoformat(),
            "commit": said(["git", "describe", "--always", "--dirty"]),
            "dry": self.dry,
            "device": self.machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "checks": checks,
            "cases": self.cases,
            "skipped": self.skipped,
        }
        slug = "dry" if self.dry else "-".join(known["device"]["name"].lower().split()[:3])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{known['date']}-{slug}-kernels.json"
        path.write_text(json.dumps(known, indent=1) + "\n")
        return path

    def machine(self) -> Record:
        found: Record = {"name": platform.processor() or platform.machine()}
        if not self.dry:
            of = torch.cuda.get_device_properties(0)
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = {"name": of.name, "driver": said(asked), "cuda": torch.version.cuda}
            found |= {"processors": of.multi_processor_count, "memory_gb": round(of.total_memory / 1e9, 1)}
        return found | {
            "copy_gb_s": round(self.copy / 1e9, 1),
            "tflop_s_bfloat16": round(self.product / 1e12, 2),
        }


def checked(got: Tensor, want: Tensor, allowed: float) -> float:
    """The largest error. Raises ValueError if `got` is not the answer."""
    if got.shape != want.shape:
        raise ValueError(f"wrong: {list(got.shape)} for {list(want.shape)}")
    got, want = got.float(), want.float()
    far = float((got - want).norm() / want.norm().clamp_min(1e-30))
    if not far <= allowed:
        raise ValueError(f"wrong: {far:.1e} away from the answer, {allowed:.0e} is allowed")
    return float((got - want).abs().max()) if got.numel() else 0.0


def verdict(target: Target | None, reached: float) -> Record:
    if target is None:
        return {}
    return {"must": target.must, "should": target.should, "met": reached >= target.must}


def spread(times: list[float]) -> Record:
    low, *_, high = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 2
    halves = [statistics.median(times[i::2] or times) for i in (0, 1)]
    return {
        "median_us": round(statistics.median(times), 2),
        "p10_us": round(low, 2),
        "p90_us": round(high, 2),
        "rounds": len(times),
        "noise": round(abs(halves[0] / halves[1] - 1), 3),
    }


def line(record: Record) -> str:
    """A record in one line."""
    what = " ".join(f"{value}" for value in record.get("options", {}).values())
    name = f"  {record['row']} {what} {record['impl']}"
    if "reason" in record:
        return f"{name}: {record['reason']}"
    reached = record.get("ratio", record["roofline_share"])
    text = f"{name}: {record['median_us']:.1f} us, {reached:.2f}x {record['baseline']}"
    return text + (f" ({record['must']}, {'met' if record['met'] else 'short'})" if "must" in record else "")


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def versions() -> Record:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def said(command: list[str]) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError as missing:
        return str(missing)
    return ran.stdout.partition("\n")[0]
