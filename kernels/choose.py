"""Which implementation of an operation runs, and why another would not.

The table is all there is: an operation's name gives the file that holds it in every implementation, and its
function has the operation's own name there. Nothing is registered, and no state but caches is kept.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from agentctx.kernels.errors import KernelUnavailable, Uncovered

OPERATIONS = {
    "dense_decode": "decode",
    "sparse_decode": "decode",
    "token_decode": "tokens",
    "pseudo_attention": "tokens",
    "merge_lse": "merge",
    "block_sparse_prefill": "prefill",
    "window_prefill": "prefill",
    "dense_prefill": "prefill",
    "token_sparse_prefill": "token_prefill",
    "complete_lists": "lists",
    "build_summary": "summary",
    "kmeans_centroids": "kmeans",
    "hadamard": "hadamard",
    "block_scores": "scores",
    "pool_queries": "scores",
    "topk_blocks": "selection",
    "topp_blocks": "selection",
    "resolve_pages": "selection",
    "select_blocks": "selection",
    "quantize_pages": "quant",
    "dequantize_pages": "quant",
    "attention_mass": "mass",
    "span_sums": "mass",
    "rope": "rope",
    "rope_move": "rope",
    "nsa_forward": "nsa",
    "write_kv": "store",
    "pack_pages": "store",
    "unpack_pages": "store",
    "copy_pages": "store",
    "int4_linear": "linear",
    "int8_linear": "linear",
    "rms_norm": "norm",
}
FOLDERS = {"reference": "reference", "torch": "fallback", "cpp": "cpu", "triton": "gpu"}
log = logging.getLogger("agentctx.kernels")


def run(operation: str, impl: str | None, device: torch.device, /, *args: Any, **options: Any) -> Any:
    """Call `operation` in the implementation `impl`, or in the best one for `device`.

    `impl` is "reference", "torch", "cpp" (or "cpp:LEVEL", see `cpu.build.LEVELS`) or "triton". What the
    chosen implementation does not cover goes to torch, logged once for each reason.

    Raises ValueError for an unknown `impl`, KernelUnavailable when one that was asked for cannot run.
    """
    names = (impl,) if impl else ("triton" if device.type == "cuda" else "cpp", "torch")
    for name in names:
        why = unavailable(operation, name)
        if why is None:
            try:
                if device.type == "cuda" and device.index != torch.cuda.current_device():
                    with torch.cuda.device(device):  # Triton launches on the current one
                        return function(operation, name)(*args, **options)
                return function(operation, name)(*args, **options)
            except Uncovered as reason:
                why = str(reason)
        if impl:
            raise KernelUnavailable(f"{operation}: {impl} cannot run: {why}")
        _say_once(operation, name, why)
    raise KernelUnavailable(f"{operation}: no implementation runs on {device}")


@functools.cache
def function(operation: str, impl: str) -> Callable[..., Any]:
    """The function that implements `operation`; a level of the C++ build is bound to it."""
    name, _, level = impl.partition(":")
    module = import_module(f"agentctx.kernels.{FOLDERS[name]}.{OPERATIONS[operation]}")
    found: Callable[..., Any] = getattr(module, operation)
    if name == "cpp":
        from agentctx.kernels.cpu import build

        return functools.partial(found, build.load(level or build.best()))
    return found


@functools.cache
def unavailable(operation: str, impl: str) -> str | None:
    """Why `impl` cannot run `operation` on this machine, or None if it can.

    For "cpp" the answer comes with the library: asking builds it, once.
    """
    name, _, level = impl.partition(":")
    if name not in FOLDERS or (level and name != "cpp"):
        raise ValueError(f"impl is {impl!r}: use one of {', '.join(FOLDERS)}, or cpp:LEVEL")
    module = f"agentctx.kernels.{FOLDERS[name]}"
    if find_spec(module) is None or find_spec(f"{module}.{OPERATIONS[operation]}") is None:
        return f"{name} does not implement it"
    if name == "triton" and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return "no NVIDIA GPU"
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed"
    if not hasattr(import_module(f"{module}.{OPERATIONS[operation]}"), operation):
        return f"{name} does not implement it"
    if name == "cpp":
        from agentctx.kernels.cpu import build

        return build.reason(level or build.best())
    return None


def available() -> dict[str, dict[str, str | None]]:
    """For each operation and implementation: None if it is usable here, or the reason why it is not."""
    return {name: {impl: unavailable(name, impl) for impl in FOLDERS} for name in OPERATIONS}


@functools.cache
def _say_once(operation: str, impl: str, why: str) -> None:
    log.info("%s runs in torch, not in %s: %s", operation, impl, why)
