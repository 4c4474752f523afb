"""How fast is the whole model? Prefill and decode, against its peers; a reading reopened against computed.

    python benchmarks/speed.py [--quick | --long | --lengths 2048 …] [--threads 2] [--dtype float32]

Ours (dense, and quest with a budget of 1,024 tokens; linear layers as stored and int4), stock transformers
(`DynamicCache`, sdpa) and, where `llama-cpp-python` is installed, llama.cpp on the GGUF file that the weights
are from take turns in one process, each over its own context of the same tokens. Prefill ends with the next
token, and so does every step of decode, which follow each other. Figures are medians, ratios are medians of
the ratios within a round. Ours reads in pieces of 512 tokens, transformers all at once, which suits it best.
Beyond the window of 8K tokens the positions are for timing only. Last, a new process gets hold of a reading
of 8K tokens: from the blocks on the disk, and by computing it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from agentctx.models.catalog import ensure
from agentctx.models.manifest import Manifest
from agentctx.models.table import SMOLLM2, Linears
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.engine import Context, Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method

HERE = Path(__file__).resolve().parent
DROPPED = 2  # rounds that only warm up
STEPS = 3  # tokens that each decodes in a round
RELOADED = 8192
METHODS = {"dense": "dense", "quest-1024": "quest:budget=1024"}
Step = Callable[[], object]


def load(folder: Path, linears: Linears, dtype: torch.dtype | None, kv: Path | None = None) -> Engine:
    """An engine over the embedded model; with a dtype, over weights in that one."""
    gguf = folder.parent / SMOLLM2.gguf.basename
    weights = Weights.load(
        folder, name="smollm2", verify=Manifest.read(folder), kv=kv, linears=linears, gguf=gguf
    )
    engine = weights.engine
    if dtype is not None and dtype != engine.body.shape.dtype:
        if linears == "int4":
            raise SystemExit("int4 is measured with --dtype bfloat16")
        body = LlamaDecoder.load(folder, dtype)
        engine = Engine(body, fingerprint="benchmark", memory_bytes=engine.pool.budget)
    engine.body.window = 1 << 20
    return engine


def text(count: int) -> list[int]:
    """Tokens as they come: what is measured does not depend on what they say."""
    return torch.randint(1000, 40_000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


class Ours:
    """Our runtime: one reading, gone on from in several ways."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines
        self.read: Context | None = None

    def prefill(self, ids: list[int]) -> None:
        engine = next(iter(self.engines.values()))
        if self.read:
            self.read.close()
        engine.prefixes.clear()
        self.read, hidden = engine.begin(ids)
        assert hidden is not None
        int(engine.logits(hidden).argmax())

    def steps(self) -> dict[str, Step]:
        """A step for each kind of linear layers and each method, over forks of what was read."""
        assert self.read is not None
        found = {}
        for kind, engine in self.engines.items():
            for name, description in METHODS.items():
                state = self.read.state.fork()
                state.method, state.reading = method(description), False
                found[f"{name}/{kind}"] = self._step(Context(engine, state, list(self.read.ids)))
        return found

    def _step(self, context: Context) -> Step:
        def step() -> None:
            hidden = context.feed([5])
            assert hidden is not None
            int(context.engine.logits(hidden).argmax())

        return step


class Stock:
    """transformers, as it comes."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        self.model = loader.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)
        self._forward(ids)

    @torch.inference_mode()
    def step(self) -> None:
        self._forward([5])

    def _forward(self, ids: list[int]) -> None:
        said = self.model(
            input_ids=torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        int(said.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp through its Python binding, flash attention on."""

    def __init__(self, gguf: Path, tokens: int, threads: int) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found]

        self.model: Any = Llama(
            str(gguf),
            n_ctx=tokens + 256,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def step(self) -> None:
        self.model.eval([5])


def interleaved(calls: dict[str, Step], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Microseconds a call took in each round that counts, the median of `repeat` calls after one another."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for _ in range(rounds + DROPPED):
        for name, call in calls.items():
            taken = []
            for _ in range(repeat):
                began = time.perf_counter()
                call()
                taken.append((time.perf_counter() - began) * 1e6)
            times[name].append(statistics.median(taken))
    gc.enable()
    return {name: taken[DROPPED:] for name, taken in times.items()}


def records(operation: str, tokens: int, dtype: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A record for each of ours and each baseline."""
    found = []
    peers = [name for name in ("transformers", "llama.cpp") if name in times]
    for name, own in times.items():
        for peer in peers if name not in peers else ():
            other = times[peer]
            low, *_, high = statistics.quantiles(own, n=10) if len(own) > 1 else own * 2
            attention, _, linears = name.partition("/")
            record: dict[str, Any] = {
                "operation": operation,
                "shape": {"tokens": tokens},
                "dtype": dtype,
                "options": {"attention": attention, "linears": linears},
                "impl": "agentctx",
                "baseline": peer,
                "median_us": round(statistics.median(own)),
                "p10_us": round(low),
                "p90_us": round(high),
                "baseline_us": round(statistics.median(other)),
                "ratio": round(statistics.median(b / a for a, b in zip(own, other, strict=True)), 3),
                "noise": round(_noise(own), 3),
            }
            found.append(record)
            print(
                f"{tokens:6} {operation:8} {name:16} {record['median_us'] / 1e3:9.1f} ms  "
                f"{record['ratio']:5.2f}x {peer} ({record['baseline_us'] / 1e3:.1f} ms)",
                flush=True,
            )
    return found


def _noise(times: Sequence[float]) -> float:
    """The even rounds against the odd ones: the same code twice."""
    odd = times[1::2] or times
    return abs(statistics.median(times[::2]) / statistics.median(odd) - 1)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All lengths; and why a peer is missing."""
    dtype = getattr(torch, options.dtype)
    kinds: list[Linears] = ["bf16", "int4"] if dtype == torch.bfloat16 else ["bf16"]
    ours = Ours({kind: load(folder, kind, dtype) for kind in kinds})
    stock, missing = Stock(folder, dtype), {}
    cases = []
    for tokens in options.lengths:
        ids = text(tokens)
        readers: dict[str, Step] = {
            "dense/bf16": partial(ours.prefill, ids),
            "transformers": partial(stock.prefill, ids),
        }
        steps: dict[str, Step] = {"transformers": stock.step}
        try:
            peer = LlamaCpp(folder.parent / SMOLLM2.gguf.basename, tokens, options.threads)
            readers["llama.cpp"] = partial(peer.prefill, ids)
            steps["llama.cpp"] = peer.step
        except ImportError as error:
            missing["llama.cpp"] = f"not measured: {error}"
        rounds = options.rounds if tokens <= RELOADED else max(1, options.rounds // 3)
        cases += records("prefill", tokens, options.dtype, interleaved(readers, rounds))
        times = interleaved(ours.steps() | steps, options.rounds, STEPS)
        cases += records("decode", tokens, options.dtype, times)
    return cases, missing


def reload(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds until a new process, its model loaded, has a reading: computed, and from the disk."""
    taken: dict[str, list[float]] = {"computed": [], "reloaded": []}
    with tempfile.TemporaryDirectory() as kept:
        _child(folder, tokens, kept)  # writes the blocks
        for _ in range(rounds):
            for name, place in (("computed", ""), ("reloaded", kept)):
                said = _child(folder, tokens, place)
                assert said["computed_tokens"] == (0 if place else tokens), said
                taken[name].append(said["seconds"])
        size = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())
    pairs = zip(taken["computed"], taken["reloaded"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return {"tokens": tokens, "bytes": size, "ratio": round(ratio, 2)} | {
        f"{name}_s": round(statistics.median(seconds), 3) for name, seconds in taken.items()
    }


def _child(folder: Path, tokens: int, kv: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(tokens), kv]
    command += ["--threads", str(torch.get_num_threads())]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def child(folder: str, tokens: str, kv: str) -> None:
    """What the new process does."""
    engine = load(Path(folder), "bf16", None, Path(kv) if kv else None)
    ids = text(int(tokens))
    engine.begin(ids[:600])[0].close()  # kernels, threads
    engine.prefixes.clear()
    began = time.perf_counter()
    context = engine.read(ids, keep=bool(kv))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "computed_tokens": context.computed}))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "llama-cpp-python"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": {
            "name": names[0] if names else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "load": [round(x, 2) for x in os.getloadavg()],
        },
        "versions": versions,
        "threads": options.threads,
        "rounds": options.rounds,
        "model": SMOLLM2.gguf.basename,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9, help="that count, besides two that warm up")
    parser.add_argument("--quick", action="store_true", help="1K tokens, three rounds")
    parser.add_argument("--long", action="store_true", help="16K and 32K too")
    parser.add_argument("--lengths", type=int, nargs="+", help="these instead, in tokens")
    parser.add_argument("--out", type=Path, help="a file under benchmarks/results/ by default")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(*options.child)
        return
    usual = [1024, 4096, 8192] + ([16384, 32768] if options.long else [])
    options.lengths = options.lengths or ([1024] if options.quick else usual)
    options.rounds = 3 if options.quick else options.rounds
    folder = ensure(SMOLLM2, Paths.default())
    report = environment(options)
    report["cases"], report["missing"] = measure(options, folder)
    report["reload"] = reload(folder, 1024 if options.quick else RELOADED, 1 if options.quick else 3)
    print(json.dumps(report["reload"]))
    slug = "-".join(report["device"]["name"].lower().split()[:3])
    name = f"{report['date']}-{slug}-{options.threads}t-speed-{options.dtype}.json"
    path = options.out or HERE / "results" / name
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
