"""Every configuration of the decode kernels, compiled: no spills, 16-byte copies, the wanted buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import pytest
import triton

from agentctx.kernels.gpu.configs import Config, pick
from agentctx.kernels.gpu.decode import CONFIGS
from agentctx.kernels.gpu.decode_paged import attend_paged
from agentctx.kernels.gpu.decode_quant import attend_quantised

POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "int8": "*i8", "int4": "*u8"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "int4": 0.5}
STRIDES = ["qb", "qh", "qt", "kp", "kh", "vp", "vh", "ksp", "ksh", "vsp", "vsh", "pb", "pl", "bb", "bl"]
LISTS = {"pb", "pl", "bb", "bl"}  # strides that need not be divisible by 16
PLAIN = {"DENSE": False, "CAPPED": False, "WINDOW": False, "VALID": False, "TAIL": False, "ALONE": False}
EVERYTHING = {"CAPPED": True, "WINDOW": True, "VALID": True, "TAIL": True}

# kind, head size, rows of a list: each row of CONFIGS at its largest.
SHAPES = [
    ("bf16", 128, 16),
    ("bf16", 128, 64),
    ("fp16", 256, 16),
    ("bf16", 256, 64),
    ("fp32", 128, 16),
    ("fp32", 256, 64),
    ("int8", 128, 16),
    ("int4", 128, 16),
    ("int8", 256, 32),
    ("int4", 256, 32),
]


def compiled(
    kind: str, dim: int, rows: int, arch: int, page: int = 64, **flags: bool
) -> tuple[aot.Report, Config]:
    quantised = kind in ("int8", "int4")
    config = pick(CONFIGS, arch, dim=dim, rows=rows, kind=kind)
    n = min(config.blocks["N"], page) if quantised else config.blocks["N"]
    q = "*bf16" if quantised else POINTER[kind]
    signature: dict[str, str] = dict.fromkeys(("Q", "TailK", "TailV", "Out", "KScale", "VScale"), q)
    signature |= dict.fromkeys(("K", "V"), POINTER[kind]) | dict.fromkeys(("Lse", "Part", "PartLse"), "*fp32")
    lists = ("Pages", "Blocks", "Counts", "Lens", "FirstPos", "PageValid", "Ticket")
    signature |= dict.fromkeys(lists, "*i32") | dict.fromkeys(("scale", "softcap"), "fp32")
    aligned = [*signature, *(s for s in STRIDES if s not in LISTS)]
    signature |= dict.fromkeys(("sink_tokens", "slots", "splits", "tokens", *STRIDES), "i32")
    sizes: dict[str, Any] = {"GROUP": rows, "SHARE": 1, "ROWS": rows, "D": dim, "PAGE": page, "N": n}
    sizes |= {"DP": triton.next_power_of_2(dim), "INT4": kind == "int4"} | PLAIN | flags
    aligned = [name for name in aligned if signature[name] != "fp32"]
    kernel = attend_quantised if quantised else attend_paged
    report = aot.compile_kernel(kernel, signature, sizes, arch, config.warps, config.stages, aligned)
    return report, config


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(("kind", "dim", "rows"), SHAPES)
def test_a_sparse_list(kind: str, dim: int, rows: int, arch: int, within: Callable[..., None]) -> None:
    report, config = compiled(kind, dim, rows, arch)
    n = config.blocks["N"]
    half = {} if kind in ("bf16", "fp16", "fp32") else {"LDS.U8": 0, "LDS.S8": 0}
    within(f"{kind} D{dim} rows{rows}", report, at_least={"LDGSTS.*128": 4}, at_most=half)
    buffers = 2 if config.stages == 5 else 3
    assert report.shared >= buffers * 2 * n * dim * BYTES[kind], "K and V are not buffered as wanted"


@pytest.mark.parametrize("kind", ("bf16", "int8", "int4"))
def test_every_option_at_once(kind: str, within: Callable[..., None]) -> None:
    report, config = compiled(kind, 128, 4, 90, **EVERYTHING)
    within(f"{kind} everything", report, at_least={"LDGSTS.*128": 4}, at_most={"LDS.[US]8": 0})
    assert report.shared >= 2 * 2 * config.blocks["N"] * 128 * BYTES[kind]


@pytest.mark.parametrize("kind", ("bf16", "int8"))
def test_dense_over_small_pages_and_odd_sizes(kind: str, within: Callable[..., None]) -> None:
    report, _ = compiled(kind, 96, 4, 90, page=16, DENSE=True, ALONE=True, WINDOW=True)
    within(f"{kind} D96 page16 dense", report, at_least={"LDGSTS": 4}, at_most={"LDS.[US]8": 0})
