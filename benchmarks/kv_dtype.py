"""What do keys and values of 8 and 4 bits cost in accuracy? Real text after a long past, against bfloat16.

    python benchmarks/kv_dtype.py DATA_DIR --out benchmarks/results/kv_dtype.json

Windows of real text, half of the Debian policy and half of stories of SQuALITY. All but the last tokens of
each are read, which leaves the open and the local blocks in bfloat16 and all before them sealed; the last are
scored in one pass. `top1` is how often the most likely token is that of bfloat16, `kl` the mean divergence
from it, `token_bytes` what a sealed token takes in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from agentctx.memory.kv.dtype import KVDtype
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.kv.quantised import QuantisedPool
from agentctx.models.catalog import ensure
from agentctx.models.manifest import Manifest
from agentctx.models.table import SMOLLM2
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.body import Body
from agentctx.runtime.engine import Engine

HERE = Path(__file__).resolve().parent
SCORED = 512
HELD: tuple[KVDtype, ...] = ("bf16", "int8", "int4")


def windows(data: Path, weights: Weights, count: int, tokens: int) -> Iterator[tuple[str, list[int]]]:
    """`count` windows, spread evenly over two kinds of text."""
    texts = {
        "debian": (data / "debian_docs/debian-policy/policy.txt").read_text(errors="replace"),
        "stories": "\n\n".join(
            path.read_text(errors="replace") for path in sorted((data / "squality/docs").iterdir())[:4]
        ),
    }
    for kind, text in texts.items():
        ids: list[int] = weights.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for start in np.linspace(0, len(ids) - tokens, count // len(texts), dtype=int):
            yield kind, ids[start : start + tokens]


def logits(body: Body, ids: list[int], held: KVDtype) -> tuple[torch.Tensor, float]:
    """float32 `[SCORED, V]` of the tokens before the last `SCORED`; and the bytes of a sealed token."""
    engine = Engine(body, fingerprint="kv_dtype", memory_bytes=1 << 30, kv_dtype=held)
    context = engine.read(ids[: -SCORED - 1])
    hidden = engine.step([context], torch.tensor([ids[-SCORED - 1 : -1]]))[0]
    found, pool = engine.logits(hidden), engine.pool
    size = pool.sealed_bytes / PAGE_TOKENS if isinstance(pool, QuantisedPool) else pool.shape.token_bytes
    context.close()
    return found, size


def compare(body: Body, ids: list[int]) -> dict[str, Any]:
    """Of one window, by how KV is held."""
    row: dict[str, Any] = {}
    plain = None
    for held in HELD:
        found, size = logits(body, ids, held)
        plain = found if plain is None else plain
        logs = plain.log_softmax(-1)
        kl = F.kl_div(found.log_softmax(-1), logs, log_target=True, reduction="none").sum(-1).mean()
        row[held] = {
            "nll": float(F.cross_entropy(found, torch.tensor(ids[-SCORED:]))),
            "top1": float((found.argmax(-1) == plain.argmax(-1)).float().mean()),
            "kl": float(kl),
            "token_bytes": size,
        }
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over windows, and the rise of the loss over bfloat16."""
    found: dict[str, Any] = {}
    for held in HELD:
        means = {key: float(np.mean([row[held][key] for row in rows])) for key in rows[0][held]}
        base = float(np.mean([row["bf16"]["nll"] for row in rows]))
        found[held] = {key: round(value, 5) for key, value in means.items()}
        found[held]["rise"] = round(means["nll"] / base - 1, 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with debian_docs/ and squality/")
    parser.add_argument("--windows", type=int, default=4, help=f"{SCORED} tokens of each are scored")
    parser.add_argument("--tokens", type=int, default=3072, help="of a window")
    parser.add_argument("--out", type=Path, default=HERE / "results/kv_dtype.json")
    options = parser.parse_args()
    folder = ensure(SMOLLM2, Paths.default())
    weights = Weights.load(folder, name="smollm2", verify=Manifest.read(folder), linears="bf16")
    rows = []
    for kind, ids in windows(options.data, weights, options.windows, options.tokens):
        rows.append({"text": kind} | compare(weights.engine.body, ids))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "environment": {
            "model": SMOLLM2.gguf.basename,
            "tokens": options.tokens,
            "scored_tokens": SCORED * len(rows),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "results": summary(rows),
        "windows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["results"], indent=1))


if __name__ == "__main__":
    main()
