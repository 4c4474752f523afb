"""For the tests of process B: the kernels that a call would launch, compiled for a GPU that is not there.

    for report in launches(lambda: scores.block_scores(q, ...), arch=90):
        within("minmax bf16 128", report, at_least={"HMMA": 1})

The operation's own host code runs on CPU tensors; its launches are caught, and each kernel is compiled as the
JIT would: constants and configuration as passed, integers of 1 as constants, integers and addresses that 16
divides marked as such. So what is compiled is what ships, and no signature is written twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import aot
import torch
from triton.runtime.jit import JITFunction

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def launches(call: Callable[[], Any], arch: int) -> list[aot.Report]:
    """Compile, for compute capability `arch`, what `call` launches through `agentctx.kernels.gpu`."""
    caught: list[tuple[JITFunction, dict[str, Any]]] = []

    def catch(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        caught.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | options))

    modules = [m for name, m in sys.modules.items() if name.startswith("agentctx.kernels.gpu.")]
    patches = [patch.object(m, "arch_of", lambda x: arch) for m in modules if hasattr(m, "arch_of")]
    for one in (*patches, running := patch.object(JITFunction, "run", catch)):
        one.start()
    try:
        call()
    finally:
        for one in (*patches, running):
            one.stop()
    return [_compiled(kernel, values, arch) for kernel, values in caught]


def _compiled(kernel: JITFunction, values: dict[str, Any], arch: int) -> aot.Report:
    constants: dict[str, Any] = {}
    signature, aligned = {}, []
    for parameter in kernel.params:
        name = parameter.name
        value = values.pop(name)
        if parameter.is_constexpr or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned += [name] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] if value % 16 == 0 else []
    return aot.compile_kernel(kernel, signature, constants, arch=arch, aligned=aligned, **values)
