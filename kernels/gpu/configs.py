"""How the Triton kernels are launched: one static table for each operation, no search at run time.

A table is a tuple of `Config` rows; the first row that fits a call is used. Tests compile every row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from agentctx.kernels.errors import Uncovered

KINDS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.uint8: "int4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One row: which calls it serves, and how their kernel is launched.

    `arch`: compute capability from which on it holds (80, 90); `dim`, `rows`: largest head size and largest
    number of rows of a tile; `kinds`: dtypes of the keys, as in KINDS (none: all of them). `blocks`: block
    sizes by the name of the kernel's constant; `warps` and `stages` as Triton means them.
    """

    arch: int = 80
    dim: int = 256
    rows: int = 1 << 30
    kinds: tuple[str, ...] = ()
    blocks: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    def fits(self, arch: int, dim: int, rows: int, kind: str) -> bool:
        wide = dim <= self.dim and rows <= self.rows
        return wide and arch >= self.arch and (not self.kinds or kind in self.kinds)

    @property
    def launch(self) -> dict[str, int]:
        """What the launch of a kernel takes: block sizes, num_warps, num_stages."""
        return self.blocks | {"num_warps": self.warps, "num_stages": self.stages}


def pick(table: tuple[Config, ...], arch: int, *, dim: int, rows: int = 1, kind: str = "bf16") -> Config:
    """The first row of `table` that serves a call. Raises Uncovered if none does."""
    for row in table:
        if row.fits(arch, dim, rows, kind):
            return row
    raise Uncovered(f"no configuration for sm_{arch}, head size {dim}, {rows} rows, {kind}")


def arch_of(x: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; the interpreter, on the CPU, plays an H200."""
    return _capability(x.get_device()) if x.is_cuda else 90


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def processors(index: int) -> int:
    """Streaming multiprocessors of the device `index`; 132, those of an H200, where there is none (-1)."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 132


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
