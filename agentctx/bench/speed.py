"""How fast is the whole model? Prefill and decode, against its peers; a reading reopened against computed.

Ours (dense and sparse, linear layers as stored and int4), stock transformers (`DynamicCache`, sdpa) and,
where `llama-cpp-python` is installed, llama.cpp on the GGUF file that the weights are from take turns in one
process, each over its own context of the same tokens. Prefill ends with the next token, and so does every
step of decode, which follow each other. Figures are medians, ratios are medians of the ratios within a
round. Ours reads in pieces of 512 tokens, transformers all at once, which suits it best. Beyond the model's
window the positions are for timing only. Then a new process gets hold of a reading: from the blocks on the
disk, and by computing it; and another says what the longest takes at its peak.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from agentctx.bench.machine import commit, environment, load
from agentctx.bench.peers import LlamaCpp, Ours, Place, Stock
from agentctx.bench.startover import peak, reload
from agentctx.bench.timing import Call, compared, interleaved
from agentctx.kernels.quant import quantize_pages
from agentctx.memory.atomic import write_bytes
from agentctx.memory.kv.pool import PAGE_TOKENS, KVShape
from agentctx.paths import Paths

DROPPED = 2  # rounds that only warm up
STEPS = 3  # tokens that each decodes in a round
LONG = 8192  # tokens above which a third of the rounds is enough
RELOADED = 8192
SLOW = 8192  # tokens above which llama.cpp, whose prefill takes minutes there, is left out
PEERS = ("transformers", "llama.cpp")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to time. `minutes`: after so many nothing new is begun; what is missing is done next time."""

    model: str
    lengths: Sequence[int]
    dtype: str
    threads: int
    rounds: int = 9
    reloaded: int = RELOADED
    minutes: float = float("inf")


def run(plan: Plan, out: Path, say: Say) -> tuple[Path, dict[str, Any]]:
    """Time what today's report in `out` lacks; it is written after each part. Returns its place and it."""
    torch.set_num_threads(plan.threads)
    report = environment() | {"model": plan.model, "dtype": plan.dtype}
    path = out / _name(report)
    if path.exists():
        report = json.loads(path.read_bytes())
    report = {"cases": [], "missing": {}, "unfinished": []} | report | {"unfinished": []}
    began = time.monotonic()
    for part, work in _parts(plan, report, say):
        if time.monotonic() - began > plan.minutes * 60:
            report["unfinished"].append(part)
            continue
        work()
        write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())
    if report["unfinished"]:
        say(f"not begun within {plan.minutes:g} minutes: {', '.join(report['unfinished'])}")
        write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())
    return path, report


def _parts(plan: Plan, report: dict[str, Any], say: Say) -> list[tuple[str, Call]]:
    """What is missing, by name."""
    place = Place.find(plan.model, Paths.default())
    timed = {case["shape"]["tokens"] for case in report["cases"]}
    wanted = [tokens for tokens in sorted(set(plan.lengths)) if tokens not in timed]
    contest = Contest(plan, place, report, say)
    parts: list[tuple[str, Call]] = [(f"{tokens} tokens", partial(contest.run, tokens)) for tokens in wanted]
    longest = max(plan.lengths)
    aside: dict[str, Callable[[], Any]] = {
        "kv_bytes": lambda: codecs(place),
        "reload": lambda: reload(plan.model, plan.reloaded, max(1, plan.rounds // 3), plan.threads),
        "peak": lambda: peak(plan.model, longest, plan.threads),
    }

    def note(name: str) -> None:
        report[name] = aside[name]()
        say(f"{name}: {json.dumps(report[name])}")

    known = {name for name in aside if name in report}
    if report.get("peak", {}).get("tokens", 0) < longest:
        known.discard("peak")
    return parts + [(name, partial(note, name)) for name in aside if name not in known]


class Contest:
    """Everyone over the same tokens, length by length."""

    def __init__(self, plan: Plan, place: Place, report: dict[str, Any], say: Say) -> None:
        self.plan, self.place, self.report, self.say = plan, place, report, say
        self.dtype: torch.dtype = getattr(torch, plan.dtype)

    @cached_property
    def ours(self) -> Ours:
        quantised = self.dtype == torch.bfloat16 and self.place.gguf is not None
        return Ours(self.place, ["bf16", "int4"] if quantised else ["bf16"], self.dtype)

    @cached_property
    def stock(self) -> Stock:
        return Stock(self.place.folder, self.dtype)

    def run(self, tokens: int) -> None:
        """Prefill, then decode."""
        ids = text(tokens, self.ours.vocabulary)
        peers: list[tuple[str, Any]] = [("transformers", self.stock)]
        try:
            if self.place.gguf is None:
                raise ImportError("the model is not from a GGUF file")
            if tokens <= SLOW:
                peers.append(("llama.cpp", LlamaCpp(self.place.gguf, tokens, self.plan.threads)))
            else:
                self.report["missing"]["llama.cpp"] = f"not measured above {SLOW:,} tokens: it takes minutes"
        except ImportError as error:
            self.report["missing"]["llama.cpp"] = f"not measured: {error}"
        rounds = self.plan.rounds if tokens <= LONG else max(1, self.plan.rounds // 3)
        readers = self.ours.readers(ids) | {name: partial(peer.prefill, ids) for name, peer in peers}
        times = interleaved(readers, rounds, dropped=DROPPED if tokens <= LONG else 1)
        found = self._records("prefill", tokens, times)
        steps = self.ours.steps() | {name: peer.step for name, peer in peers}
        times = interleaved(steps, self.plan.rounds, dropped=DROPPED, repeat=STEPS)
        self.report["cases"] += found + self._records("decode", tokens, times)

    def _records(self, operation: str, tokens: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
        """A record for each of ours and each baseline."""
        found = []
        for name in times.keys() - set(PEERS):
            attention, _, linears = name.partition("/")
            for peer in times.keys() & set(PEERS):
                record: dict[str, Any] = {
                    "operation": operation,
                    "shape": {"tokens": tokens},
                    "dtype": self.plan.dtype,
                    "options": {"attention": attention, "linears": linears},
                    "impl": "agentctx",
                    "baseline": peer,
                    "commit": commit(),
                    "load": load(),
                } | compared(times[name], times[peer])
                found.append(record)
        found.sort(key=lambda record: (record["baseline"], sorted(record["options"].items())))
        for record in found:
            self.say(line(record))
        return found


def line(record: dict[str, Any]) -> str:
    """A record as a person reads it."""
    name = "/".join(record["options"].values())
    return (
        f"{record['shape']['tokens']:6} {record['operation']:8} {name:20} "
        f"{record['median_us'] / 1e3:9.1f} ms  "
        f"{record['ratio']:5.2f}x {record['baseline']} ({record['baseline_us'] / 1e3:.1f} ms)"
    )


def text(count: int, vocabulary: int) -> list[int]:
    """Tokens as they come: what is measured does not depend on what they say."""
    chance = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(vocabulary // 50, vocabulary, (count,), generator=chance).tolist()
    return found


def codecs(place: Place) -> dict[str, float]:
    """Bytes per token of the model's keys and values, as each codec stores them."""
    shape = place.load().engine.body.shape
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = KVShape(shape.layers, shape.kv_heads, shape.head_dim, dtype)
        found[str(dtype).removeprefix("torch.")] = float(plain.token_bytes)
    page = torch.randn(1, shape.kv_heads, PAGE_TOKENS, shape.head_dim)
    for bits in (8, 4):
        stored = quantize_pages(page, page, bits)
        parts = (stored.k, stored.v, stored.k_scale, stored.v_scale)
        held = sum(part.nbytes for part in parts if part is not None)
        found[f"int{bits}"] = held * shape.layers / PAGE_TOKENS
    return found


def _name(report: dict[str, Any]) -> str:
    slug = "-".join(report["device"]["name"].lower().replace("(r)", "").split()[:3])
    model = Path(report["model"]).stem
    return f"{report['date']}-{slug}-{report['threads']}t-speed-{model}-{report['dtype']}.json"
