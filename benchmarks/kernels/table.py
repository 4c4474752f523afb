"""Measure every kernel, print how far each target of the design is met, write one JSON for each operation.

python benchmarks/kernels/table.py              all, less than ten minutes on one thread
python benchmarks/kernels/table.py --quick      short contexts only
python benchmarks/kernels/table.py --only decode prefill
python benchmarks/kernels/table.py --threads 2  on an idle machine: wall time
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from measure import RESULTS, Bench, ceilings, device, write

BENCHES = ("decode", "prefill", "scores", "mass", "store")
CONTEXTS = (8192, 16384, 32768, 131072)
# Ratios to the baseline that must be reached, one thread: operation, dtype, implementation, baseline.
TARGETS: dict[tuple[str, str, str, str], tuple[float | None, ...]] = {
    ("sparse_decode", "bfloat16", "cpp", "sdpa"): (6, 12, 17, 30),
    ("sparse_decode", "float32", "cpp", "sdpa"): (6, 8, 14, 35),
    ("sparse_decode", "bfloat16", "cpp", "sdpa+cat"): (12, 25, 30, 100),
    ("dense_decode", "bfloat16", "cpp", "sdpa"): (1.3, 1.3, 1.4, 1.6),
    ("dense_decode", "float32", "cpp", "sdpa"): (1.1, 1.0, 0.95, 1.5),
    ("block_sparse_prefill", "bfloat16", "cpp", "sdpa causal"): (3.9, 6.5, 12, None),
    ("block_sparse_prefill", "float32", "cpp", "sdpa causal"): (4.2, 8.5, None, None),
    ("dense_prefill", "bfloat16", "cpp", "sdpa causal"): (1.2, 1.0, None, None),
    ("dense_prefill", "float32", "cpp", "sdpa causal"): (1.1, 1.1, None, None),
    ("sparse_decode", "bfloat16", "torch", "sdpa"): (1.9, 4.5, 8, 28),
    ("block_sparse_prefill", "bfloat16", "torch", "sdpa causal"): (2.1, 3.7, 8, None),
}


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The targets as a Markdown table: measured (wanted, how far it is missed), share of the roofline."""
    lines = ["| case | 8K | 16K | 32K | 128K |", "| --- | --- | --- | --- | --- |"]
    for (operation, dtype, impl, baseline), wanted in TARGETS.items():
        cells = []
        for tokens, target in zip(CONTEXTS, wanted, strict=True):
            rows = [
                row
                for row in results.get(operation, [])
                if (row["dtype"], row["impl"], row["shape"]["tokens"]) == (dtype, impl, tokens)
                and row["baseline"].partition(",")[0] == baseline
            ]
            cells.append("" if target is None else cell(rows, target))
        lines.append(f"| {operation}, {dtype}, {impl} against {baseline} | {' | '.join(cells)} |")
    return lines


def cell(rows: list[dict[str, Any]], target: float) -> str:
    if not rows:
        return f"not measured ({target:g})"
    if "ratio" not in rows[0]:
        return f"none ({target:g}): {rows[0]['reason']}"
    ratio, share = rows[0]["ratio"], rows[0]["roofline_share"]
    state = "met" if ratio >= target else f"{1 - ratio / target:.0%} short"
    return f"{ratio:.2f} ({target:g}, {state}), {share:.0%}"


def rest(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What has no target in that table."""
    lines = ["| operation | median us | ratio | roofline |", "| --- | --- | --- | --- |"]
    in_table = {operation for operation, *_ in TARGETS}
    for row in [row for operation, rows in results.items() if operation not in in_table for row in rows]:
        options = " ".join(str(value) for value in row["options"].values())
        name = f"{options}, {row['dtype']}, {row['shape']['tokens']} tokens, {row['impl']}"
        if "ratio" in row:
            times = f"{row['median_us']:.0f} | {row['ratio']:.2f} of {row['baseline']}"
            said = f"{times} | {row['roofline_share']:.0%}"
        else:
            said = f"{row['reason']} | | "
        lines.append(f"| {name} | {said} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="short contexts, for trying out")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES)
    parser.add_argument("--flex", action="store_true", help="with compiled flex_attention at 8K")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    bench = Bench.here(options.threads, quick=options.quick, flex=options.flex)
    print({**device(), **ceilings(bench), "threads": bench.threads}, flush=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.only:
        print(f"{name}, after {time.perf_counter() - began:.0f} s", flush=True)
        results |= import_module(f"bench_{name}").run(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    for operation, cases in results.items():
        write(operation, bench, cases, options.out)
    print("\n".join(["", *table(results), "", *rest(results), ""]))
    print(f"{time.perf_counter() - began:.0f} s; results are in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
