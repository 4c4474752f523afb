"""The twins of a model's linear layers, and the file that keeps them between processes.

To quantise and pack takes some 30 ns a weight, every time; a file takes what reading it takes. What it holds
is in the layout that torch's product wants on this processor, so it is a cache and nothing else: one that
was made of other weights, by another version of torch or on another processor, or that is damaged, does not
count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from agentctx.kernels.linear import Int4Weight, Int8Weight, pack_int4, pack_int4_groups, pack_int8
from agentctx.memory.atomic import write_bytes
from agentctx.runtime.linear import GROUP, Linear

FILE = "int4.safetensors"
VERSION = "1"
HEAD = "head"  # the layer that gets 8 bits
Named = Iterable[tuple[str, tuple[str, ...], Linear]]  # name, the tensors it joins, the layer


class Codes(NamedTuple):
    """A weight that was of 4 bits already: code * scale + minimum."""

    codes: Tensor  # uint8 `[out, in]`, 0 to 15
    scales: Tensor  # float32 `[out, in / group]`
    minima: Tensor  # the same


def make(linears: Named, known: Mapping[str, Codes]) -> int:
    """Give every layer that can have one a twin; returns how many weights were quantised to 4 bits for it.

    `known` holds codes of tensors by name, and is used where it agrees with the weights.
    """
    quantised = 0
    for name, names, linear in _able(linears):
        if name == HEAD:
            linear.twin = pack_int8(linear.weight)
            continue
        parts = [known[name] for name in names if name in known]
        if len(parts) == len(names) and _same(
            joined := Codes(*map(torch.cat, zip(*parts, strict=True))), linear
        ):
            linear.twin = pack_int4_groups(*joined)
        else:
            linear.twin = pack_int4(linear.weight, group=GROUP)
            quantised += linear.weight.numel()
    return quantised


def keep(path: Path, linears: Named, *, source: str) -> None:
    """Write the twins of the weights whose hash is `source`; OSError if that fails."""
    tensors: dict[str, Tensor] = {}
    for name, _, linear in linears:
        if linear.twin is not None:
            tensors |= {f"{name}.codes": linear.twin[0], f"{name}.scales": linear.twin[1]}
    write_bytes(path, save(tensors, _about(source) | {"checksum": _checksum(tensors)}))


def take(path: Path, linears: Named, *, source: str) -> bool:
    """Give the layers the twins from a file; False if there is none that fits, and nothing is changed."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if not _about(source).items() <= about.items():
                return False
            # Copies, which are aligned: torch's product of 8 bits crashes on codes that are not.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    if about.get("checksum") != _checksum(tensors):
        return False
    able = _able(linears)
    if tensors.keys() != {f"{name}.{part}" for name, _, _ in able for part in ("codes", "scales")}:
        return False
    for name, _, linear in able:
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        rows, columns = linear.weight.shape
        if name == HEAD:
            linear.twin = Int8Weight(codes, scales)
        else:
            linear.twin = Int4Weight(codes, scales, (rows, columns), columns // scales.shape[0])
    return True


def _able(linears: Named) -> list[tuple[str, tuple[str, ...], Linear]]:
    """Those that can have a twin."""
    return [found for found in linears if found[0] == HEAD or found[2].fits_int4]


def _same(found: Codes, linear: Linear) -> bool:
    """Whether codes and weight are one thing, the rounding of the weight aside."""
    rows, columns = linear.weight.shape
    if found.codes.shape != (rows, columns) or rows != found.scales.shape[0]:
        return False
    groups = found.codes.view(rows, found.scales.shape[1], -1)
    values = groups * found.scales[..., None] + found.minima[..., None]
    return torch.allclose(values.view(rows, columns), linear.weight.float(), rtol=2**-7, atol=1e-6)


def _about(source: str) -> dict[str, str]:
    layout = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return {"version": VERSION, "source": source, "layout": layout}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
