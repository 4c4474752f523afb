"""For the tests of process B: compile what a host function would launch, without launching it.

    reports = launched(80, lambda: prefill.dense_prefill(q, ...), prefill.prefill_kernel)

Arguments may be meta tensors, so a case has the sizes of real ones. Types and hints are those that the JIT
finds: pointers and numbers that 16 divides, numbers that are 1, arguments that are None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import pytest
import torch
from torch import Tensor

from agentctx.kernels.gpu import configs
from agentctx.kernels.records import BlockSelection, KVPages

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


def launched(
    arch: int, call: Callable[[], Any], *kernels: Any, users: tuple[Any, ...] = ()
) -> list[aot.Report]:
    """Reports of the launches of `kernels` in `call`, in order; `users` are modules that import `arch_of`."""
    reports: list[aot.Report] = []

    def recorder(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **named: Any) -> None:
            assert all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)), grid
            reports.append(_compiled(kernel, arch, args, named))

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module in (configs, *users):
            patch.setattr(module, "arch_of", lambda x: arch)
        for kernel in kernels:
            patch.setattr(kernel, "run", recorder(kernel))
        call()
    return reports


def _compiled(kernel: Any, arch: int, args: tuple[Any, ...], named: dict[str, Any]) -> aot.Report:
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(name)  # torch's allocator aligns further
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    return aot.compile_kernel(kernel, signature, constants, arch, aligned=aligned, **options)


def ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pool(
    format: str, size: int, dtype: torch.dtype = torch.bfloat16, *, page: int = 64, valid: bool = False
) -> KVPages:
    """4,096 pages of 8 heads that hold nothing."""
    lead = (4096, 8)
    marks = ints(4096) if valid else None
    if format == "paged":
        shape = (*lead, page, size)
        return KVPages(values(*shape, dtype=dtype), values(*shape, dtype=dtype), page, size, page_valid=marks)
    width, of = (size, torch.int8) if format == "int8" else (size // 2, torch.uint8)
    k, v = values(*lead, page, width, dtype=of), values(*lead, width, page, dtype=of)
    return KVPages(k, v, page, size, format, values(*lead, size), values(*lead, size), marks)


def lists(*shape: int) -> BlockSelection:
    return BlockSelection(ints(*shape), ints(*shape), ints(*shape[:-1]))
