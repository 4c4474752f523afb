"""Linear layers of few bits for a local model: where their codes come from, and where they are kept.

A GGUF file in Q4_0 or Q4_1 has codes already. Q4_1 holds groups of 32 weights as a scale, a minimum and 32
codes, Q4_0 without the minimum, which is -8 scales. They are what the int4 product takes, so that nothing has
to be quantised a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from agentctx.models.manifest import Manifest, sha256
from agentctx.runtime import twins
from agentctx.runtime.linear import GROUP
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.twins import Codes

Origin = Literal["gguf", "weights"]  # of the codes; they differ, and so do the answers
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


def quantise(
    body: LlamaDecoder,
    folder: Path,
    *,
    source: str,
    manifest: Manifest | None,
    gguf: Path | None,
    warn: Callable[[str], None] | None,
) -> Origin:
    """Give the linear layers of `body`, loaded from `folder`, their 4-bit twins; returns what they are of.

    They are kept in the folder if it has a manifest, which says that it is ours, under the hash `source`.
    Codes come from `gguf` if the folder was made of it; else the weights are quantised, and `warn` is told
    if that is a second time.
    """
    if manifest is None:
        twins.make(body.linears(), {})
        origin: Origin = "weights"
    else:
        origin = _take_or_make(body, folder, source, manifest, gguf)
    if manifest and origin == "weights" and warn:
        warn(
            f"the GGUF file that {folder} was made of is gone: its weights are quantised a second time, "
            "which costs some accuracy"
        )
    body.weight_bytes += sum(
        linear.twin[0].nbytes + linear.twin[1].nbytes for _, _, linear in body.linears() if linear.twin
    )
    return origin


def _take_or_make(
    body: LlamaDecoder, folder: Path, source: str, manifest: Manifest, gguf: Path | None
) -> Origin:
    """Twins of the file in `folder`, and that file. One of the weights does only while the GGUF is gone."""
    place = folder / twins.FILE
    if twins.take(place, body.linears(), source=f"{source} gguf"):
        return "gguf"
    found = gguf if gguf and gguf.is_file() and sha256(gguf) == manifest.source else None
    origin: Origin = "gguf" if found else "weights"
    if found or not twins.take(place, body.linears(), source=f"{source} {origin}"):
        twins.make(body.linears(), codes(found) if found else {})
        with suppress(OSError):  # without the file, the next process makes them again
            twins.keep(place, body.linears(), source=f"{source} {origin}")
    return origin


def codes(gguf: Path) -> dict[str, Codes]:
    """The codes of every Q4_0 or Q4_1 tensor by its name in a Llama of transformers, without ".weight"."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    heads = {
        "attn_q": f"{architecture}.attention.head_count",
        "attn_k": f"{architecture}.attention.head_count_kv",
    }
    found = {}
    for tensor in reader.tensors:
        kind, name = tensor.tensor_type.name, _name(tensor.name)
        if kind not in ("Q4_0", "Q4_1") or name is None:
            continue
        part = tensor.name.split(".")[-2]
        turned = architecture == "llama" and part in heads and heads[part] in reader.fields
        count = int(reader.fields[heads[part]].contents()) if turned else None
        found[name] = _unpacked(np.asarray(tensor.data), kind, count)
    return found


def _name(name: str) -> str | None:
    if name == "output.weight":
        return "lm_head"
    block = name.split(".")
    if len(block) == 4 and block[0] == "blk" and block[2] in NAMES and block[3] == "weight":
        return f"model.layers.{block[1]}.{NAMES[block[2]]}"
    return None


def _unpacked(data: np.ndarray[Any, Any], kind: str, heads: int | None) -> Codes:
    """`data` uint8 `[out, bytes]`: blocks of a float16 scale, in Q4_1 a float16 minimum, and 16 bytes whose
    low halves are the first 16 codes and whose high halves the others.
    """
    head = 4 if kind == "Q4_1" else 2
    blocks = data.reshape(data.shape[0], -1, head + GROUP // 2)
    if heads is not None:  # llama.cpp interleaves the halves of every head that is rotated
        halves = blocks.reshape(heads, -1, 2, *blocks.shape[1:])
        blocks = halves.swapaxes(1, 2).reshape(blocks.shape)
    numbers = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
    scales = numbers[..., 0]
    minima = numbers[..., 1] if kind == "Q4_1" else -8 * scales
    values = blocks[..., head:]
    whole = np.concatenate([values & 15, values >> 4], axis=-1).reshape(data.shape[0], -1)
    return Codes(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (whole, scales, minima)))
