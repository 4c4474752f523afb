"""What do linear layers of 4 bits cost in accuracy? Negative log-likelihood of real text, against bfloat16.

    python benchmarks/linears.py DATA_DIR --out benchmarks/results/linears.json

Windows of 2,049 tokens, half of them from the Debian manuals and half from Wikipedia passages of Natural
Questions. The first half of each window is read once, as a prompt is read: in bfloat16. The second half is
scored eight tokens at a time, so that every pass goes through the 4-bit weights: `repacked` has the codes of
the GGUF file and a head of 8 bits, as the file has; `requantised` has new codes, made of the bfloat16
weights; `int4_head` is `repacked` with a head of 4 bits too. The embedded model's "auto" is int4
while the rise of `repacked` stays below 2 % (`agentctx/models/table.py`). Intervals are 95 % bootstrap
intervals over windows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from agentctx.kernels.linear import Int4Weight, Int8Weight, pack_int4
from agentctx.models.catalog import ensure
from agentctx.models.int4 import codes
from agentctx.models.manifest import Manifest
from agentctx.models.table import SMOLLM2
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime import twins
from agentctx.runtime.context import Context
from agentctx.runtime.linear import FEW
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.twins import HEAD

HERE = Path(__file__).resolve().parent
PREFIX, WINDOW = 1024, 2049
RESAMPLES = 10_000
Twins = dict[str, Int4Weight | Int8Weight | None]


def windows(data: Path, weights: Weights, count: int) -> Iterator[tuple[str, list[int]]]:
    """`count` windows, spread evenly over two kinds of text."""
    debian = data / "debian_docs"
    manuals = ("debian-policy/policy.txt", "debian-faq/debian-faq.txt", "doc-debian/mailing-lists.txt")
    rows = (json.loads(line) for line in (data / "lost_in_the_middle/nq_oracle.jsonl").open())
    texts = {
        "debian": "\n\n".join((debian / name).read_text(errors="replace") for name in manuals),
        "wikipedia": "\n\n".join(dict.fromkeys(row["context"] for row in rows)),
    }
    for kind, text in texts.items():
        ids = weights.tokenizer.encode(text)
        for start in np.linspace(0, len(ids) - WINDOW, count // len(texts), dtype=int):
            yield kind, ids[start : start + WINDOW]


def variants(body: LlamaDecoder, gguf: Path) -> dict[str, Twins]:
    """The twins of every layer, by variant; and how many weights each had to quantise is printed."""
    found: dict[str, Twins] = {"bf16": {name: None for name, _, _ in body.linears()}}
    for variant, known in (("repacked", codes(gguf)), ("requantised", {})):
        quantised = twins.make(body.linears(), known)
        print(f"{variant}: {quantised:,} weights quantised to 4 bits", flush=True)
        found[variant] = {name: linear.twin for name, _, linear in body.linears()}
    return found | {"int4_head": found["repacked"] | {HEAD: pack_int4(body.head.weight)}}


def score(context: Context, ids: list[int]) -> tuple[np.ndarray, torch.Tensor]:
    """Negative log-likelihood of each of `ids` after the context's last token, and float32 logits."""
    rows = []
    for start in range(0, len(ids), FEW):
        piece = torch.tensor([ids[start : start + FEW]])
        hidden = context.engine.step([context], piece, spoken=True)
        rows.append(context.engine.logits(hidden, spoken=True)[0])  # as few rows as when generating
    logits = torch.cat(rows)[:-1]
    losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return losses.double().numpy(), logits


def compare(weights: Weights, gguf: Path, texts: Iterator[tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """A row per window: mean loss by variant, and how each agrees with bfloat16."""
    body = weights.engine.body
    assert isinstance(body, LlamaDecoder)
    sets = variants(body, gguf)
    rows = []
    for kind, ids in texts:
        read = weights.engine.read(ids[:PREFIX])
        row: dict[str, Any] = {"text": kind, "scored": WINDOW - PREFIX - 1}
        dense = None
        for variant, held in sets.items():
            for name, _, linear in body.linears():
                linear.twin = held[name]
            fork = read.fork()
            losses, logits = score(fork, ids[PREFIX:])
            fork.close()
            dense = logits if dense is None else dense
            row[variant] = {
                "nll": float(losses.mean()),
                "top1": float((logits.argmax(-1) == dense.argmax(-1)).float().mean()),
                "kl": float(F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True,
                                     reduction="none").sum(-1).mean()),
            }  # fmt: skip
        read.close()
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By variant: means, and the rise over bfloat16 with its interval."""
    draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    base = np.array([row["bf16"]["nll"] for row in rows])
    found = {}
    for variant in ("bf16", "repacked", "requantised", "int4_head"):
        own = np.array([row[variant]["nll"] for row in rows])
        rises = own[draws].mean(1) / base[draws].mean(1) - 1
        found[variant] = {
            "nll": round(float(own.mean()), 4),
            "rise": round(float(own.mean() / base.mean() - 1), 5),
            "rise_95": [round(float(x), 5) for x in np.quantile(rises, [0.025, 0.975])],
            "top1": round(float(np.mean([row[variant]["top1"] for row in rows])), 4),
            "kl": round(float(np.mean([row[variant]["kl"] for row in rows])), 5),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with debian_docs/ and lost_in_the_middle/")
    parser.add_argument("--windows", type=int, default=8, help="1,024 tokens of each are scored")
    parser.add_argument("--out", type=Path, default=HERE / "results/linears.json")
    options = parser.parse_args()
    folder = ensure(SMOLLM2, Paths.default())
    weights = Weights.load(folder, name="smollm2", verify=Manifest.read(folder), linears="bf16")
    started = time.perf_counter()
    texts = windows(options.data, weights, options.windows)
    rows = compare(weights, folder.parent / SMOLLM2.gguf.basename, texts)
    report = {
        "environment": {
            "model": SMOLLM2.gguf.basename,
            "rows_at_a_time": FEW,
            "prefix": PREFIX,
            "scored_tokens": sum(row["scored"] for row in rows),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "seconds": round(time.perf_counter() - started, 1),
        "results": summary(rows),
        "windows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["results"], indent=1))


if __name__ == "__main__":
    main()
