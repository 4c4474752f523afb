"""A process of its own: how long until it has a reading, and the most memory that reading takes.

Started by `agentctx bench speed`; the last line that it prints is JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentctx.memory.errors import AgentctxError

WARM = 600  # tokens that load kernels and threads before the clock starts


def reload(model: str, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds until a new process, its model loaded, has a reading: computed, and from the disk."""
    taken: dict[str, list[float]] = {"computed": [], "reloaded": []}
    with tempfile.TemporaryDirectory() as kept:
        started(model, tokens, threads, kept)  # writes the blocks
        for _ in range(rounds):
            for name, place in (("computed", ""), ("reloaded", kept)):
                said = started(model, tokens, threads, place)
                wanted = 0 if place else tokens
                if said["computed_tokens"] != wanted:
                    raise AgentctxError(
                        f"{said['computed_tokens']} tokens were computed where {wanted} were to be"
                    )
                taken[name].append(said["seconds"])
        size = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())
    pairs = zip(taken["computed"], taken["reloaded"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return {"tokens": tokens, "bytes": size, "ratio": round(ratio, 2), "rounds": rounds} | {
        f"{name}_s": round(statistics.median(seconds), 3) for name, seconds in taken.items()
    }


def peak(model: str, tokens: int, threads: int) -> dict[str, Any]:
    """The memory of a process that reads `tokens`: at its peak, and what weights and KV of it are."""
    said = started(model, tokens, threads, "")
    return {"tokens": tokens} | {
        key: said[key] for key in ("before_mib", "peak_mib", "weights_mib", "kv_mib")
    }


def started(model: str, tokens: int, threads: int, kv: str) -> dict[str, Any]:
    """What a new process says of a reading of `tokens`; `kv` keeps it on disk, empty for nowhere."""
    command = [sys.executable, "-m", "agentctx.bench.startover", model, str(tokens), str(threads), kv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise AgentctxError(f"a process that reads {tokens:,} tokens failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(model: str, tokens: str, threads: str, kv: str) -> None:
    """What the new process does."""
    import torch

    from agentctx.bench.machine import forget_peak, peak_mib
    from agentctx.bench.peers import ANY_LENGTH, Place
    from agentctx.bench.speed import text
    from agentctx.paths import Paths

    torch.set_num_threads(int(threads))
    weights = Place.find(model, Paths.default()).load(kv=Path(kv) if kv else None)
    engine = weights.engine
    engine.body.window = ANY_LENGTH
    ids = text(int(tokens), weights.tokenizer.backend.get_vocab_size())
    engine.begin(ids[:WARM])[0].close()
    engine.prefixes.clear()
    forget_peak()
    before = peak_mib()
    began = time.perf_counter()
    context = engine.read(ids, keep=bool(kv))
    said = {
        "seconds": time.perf_counter() - began,
        "computed_tokens": context.computed,
        "before_mib": before,
        "peak_mib": peak_mib(),
        "weights_mib": engine.body.weight_bytes >> 20,
        "kv_mib": engine.pool.used_bytes >> 20,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
