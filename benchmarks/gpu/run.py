"""Check, time and compare the Triton kernels in one call, most important rows first; writes one JSON.

    python benchmarks/gpu/run.py                  # on a machine with a GPU, under eight minutes
    python benchmarks/gpu/run.py --dry            # to its end on a CPU, in the interpreter: proves the script
    python benchmarks/gpu/run.py --only sparse    # rows whose name holds one of the words

Ceilings and agreement come first. A row that fails or does not fit the time stands in the results with the
reason. Exit code 1 if an operation disagrees with its reference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name holds one of these words")
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing begins that would end later")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (benchmarks/results; dry: a scratch folder)"
    )
    return parser.parse_args()


def main() -> int:
    began, given = time.perf_counter(), options()
    sys.path.insert(1, str(ROOT))  # a checkout need not be installed: only torch and triton are needed
    if given.dry:  # the interpreter of the tests, with right bfloat16; it must come before Triton
        sys.path.insert(0, str(ROOT / "tests" / "kernels"))
        import interp  # noqa: F401

    import agreement
    import peers
    import torch
    from draw import LARGE, SMALL
    from measure import Bench, Record

    if not (given.dry or torch.cuda.is_available()):
        print("no NVIDIA GPU: --dry runs the script on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bench = Bench(given.dry, began + 60 * given.minutes)
    bench.ceilings()
    print(f"copy {bench.copy / 1e9:.0f} GB/s, product {bench.product / 1e12:.1f} TFLOP/s", flush=True)
    checks: list[Record] = list(agreement.run(bench))
    for name, seconds, call in rows(bench, SMALL if given.dry else LARGE):
        if given.only is None or any(word in name for word in given.only):
            bench.attempt(name, 0 if given.dry else seconds, call)
    peers.named(bench)
    out = given.out or (Path(tempfile.mkdtemp(prefix="agentctx-dry-")) if given.dry else RESULTS)
    print(f"wrote {bench.write(out, checks)}, {time.perf_counter() - began:.0f} s")
    return int(any("reason" in check for check in checks))


def rows(bench, of) -> list[tuple[str, float, Callable[[], Iterable[dict]]]]:
    """Name, seconds to allow for, and what measures it; in order of importance."""
    import bench_decode as decode
    import bench_mass as mass
    import bench_nsa as nsa
    import bench_prefill as prefill
    import bench_store as store
    import peers
    from measure import Target

    return [
        ("dense_decode 128K", 60, lambda: decode.dense(bench, of, peers.decode)),
        ("sparse_decode 4096 of 128K", 20, lambda: decode.sparse(bench, of, of.near, Target(6, 9))),
        ("block_sparse_prefill 128K 10 %", 25, lambda: prefill.run(bench, of, 0.1, with_flex=False)),
        ("sparse_decode 4096 of 1M", 20, lambda: decode.sparse(bench, of, of.far, Target(25, 36))),
        ("quantised decode 128K", 20, lambda: decode.quantised(bench, of)),
        ("attention_mass 128K", 20, lambda: mass.run(bench, of)),
        ("block_sparse_prefill 128K 100 %", 30, lambda: prefill.run(bench, of, 1.0, with_flex=False)),
        ("rope", 10, lambda: store.rotary(bench, of)),
        ("quantize_pages", 10, lambda: store.coded(bench, of)),
        ("build_summary", 15, lambda: store.summaries(bench, of)),
        ("write_kv", 10, lambda: store.writes(bench, of)),
        ("nsa_forward 32K", 40, lambda: nsa.run(bench, of)),
        ("block_sparse_prefill 128K 10 % flex", 60, lambda: prefill.run(bench, of, 0.1, with_flex=True)),
        ("dense_decode 128K flashinfer", 90, lambda: decode.dense(bench, of, peers.infer)),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
