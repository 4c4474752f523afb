"""The plain decoder that most models are: Llama, Mistral without a window, Qwen 2 and 3.

Reads a folder of safetensors itself, so that a command line tool starts in the time that torch takes to
import; transformers' model code imports torch's compiler and its distributed tensors, three times as much.
It also runs ahead of it: Q, K and V are one product, gate and up another, and a step is some fourteen
operators a layer. What is not exactly this architecture goes through `runtime/hf`; `supports` says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.norm import rms_norm
from agentctx.kernels.rope import rope
from agentctx.memory.kv.pool import KVShape
from agentctx.runtime.checkpoint import Checkpoint, read_tensors
from agentctx.runtime.layer import Scoring, with_sinks
from agentctx.runtime.linear import Linear
from agentctx.runtime.rotation import RopeScaling, Rotation
from agentctx.runtime.state import KVState

NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(  # with keys that have other defaults there
    {
        "llama": (),
        "mistral": ("num_key_value_heads", "sliding_window"),
        "qwen2": ("num_key_value_heads",),
        "qwen3": ("num_key_value_heads", "head_dim"),
    }
)
JOINED: Mapping[str, tuple[str, ...]] = MappingProxyType(  # products over one input, made as one
    {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
)


def supports(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes this architecture and nothing beyond it."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        return False
    windowed = config.get("sliding_window") is not None
    if family != "mistral":
        windowed = windowed and config.get("use_sliding_window", True)
    return (
        all(key in config for key in (*NEEDED, *FAMILIES[family]))
        and all(_plain(config.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
        and config.get("partial_rotary_factor", 1.0) == 1.0
        and config.get("hidden_act", "silu") == "silu"
        and set(config.get("layer_types") or ()) <= {"full_attention"}
        and not windowed
        and "quantization_config" not in config
    )


def _plain(rope: Mapping[str, Any]) -> bool:
    """Whether a description of the rotary positions asks for nothing but a base."""
    return (
        rope.get("rope_type", rope.get("type", "default")) == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not any(isinstance(value, Mapping) for value in rope.values())  # one for each kind of layer
    )


@dataclass(slots=True)
class _Layer:
    before: Tensor  # weight of the norm before attention
    q_norm: Tensor | None
    k_norm: Tensor | None
    after: Tensor  # and of the one before the rest
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


class LlamaDecoder:
    """A `Body`. Weights are in the dtype they are stored in, or in `dtype`."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps: float = config.get("rms_norm_eps", 1e-6)
        self.window: int = config["max_position_embeddings"]
        self.shape = KVShape(config["num_hidden_layers"], self.kv_heads, self.head_dim, dtype)
        theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 10000.0)
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float()
        self.rotation = Rotation(1.0 / (theta ** (steps / self.head_dim)))
        self.scoring = Scoring(self.head_dim**-0.5, rotation=self.rotation)
        weights = Checkpoint(tensors, dtype, config)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        own = tensors.get("lm_head.weight")
        tied = config.get("tie_word_embeddings", False) and (  # as transformers: a head that differs is used
            own is None or torch.equal(own, tensors["model.embed_tokens.weight"])
        )
        self.head = Linear(self.embedding if tied else weights["lm_head.weight"])
        self.layers = [self._layer(weights, index) for index in range(self.shape.layers)]
        self.weight_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> LlamaDecoder:
        """Read a folder whose config `supports` accepts.

        Raises ModelError for a shard that is missing or damaged, and for a tensor that is missing or does not
        fit.
        """
        config = json.loads((folder / "config.json").read_bytes())
        return cls(config, read_tensors(folder), dtype)

    def forward(self, ids: Tensor, state: KVState) -> Tensor:
        """See `Body`."""
        x = F.embedding(ids, self.embedding)
        at = state.positions(ids.shape[1]).to(torch.int32)
        for index, layer in enumerate(self.layers):
            x += self._attend(index, layer, rms_norm(x, layer.before, eps=self.eps), at, state)
            gate, up = layer.gate_up(rms_norm(x, layer.after, eps=self.eps)).chunk(2, -1)
            x += layer.down(F.silu(gate).mul_(up))
        return rms_norm(x, self.norm, eps=self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Body`."""
        return self.head(hidden)

    def rotations(self) -> tuple[Rotation | None, ...]:
        """See `Body`."""
        return (self.scoring.rotation,) * self.shape.layers

    def linears(self) -> Iterator[tuple[str, tuple[str, ...], Linear]]:
        """Every linear layer by a name of its own, with the names of the tensors whose rows it joins."""
        for index, layer in enumerate(self.layers):
            for part, names in JOINED.items():
                joined = tuple(f"model.layers.{index}.{name}" for name in names)
                yield f"{index}.{part}", joined, getattr(layer, part)
        yield "head", ("lm_head",), self.head

    def plain(self) -> LlamaDecoder:
        """See `Body`; no weight is copied."""
        if all(linear.twin is None for _, _, linear in self.linears()):
            return self
        found = copy(self)
        found.head = self.head.plain()
        found.layers = [
            replace(
                layer,
                qkv=layer.qkv.plain(),
                out=layer.out.plain(),
                gate_up=layer.gate_up.plain(),
                down=layer.down.plain(),
            )
            for layer in self.layers
        ]
        return found

    def rescaled(self, scaling: RopeScaling) -> LlamaDecoder:
        """See `Body`; no weight is copied."""
        found = copy(self)
        inv_freq, factor = scaling.table(self.rotation.inv_freq, self.window)
        found.rotation = Rotation(inv_freq, scaling=factor)
        found.scoring = replace(self.scoring, rotation=found.rotation)
        found.window = scaling.window(self.window)
        return found

    def _attend(self, index: int, layer: _Layer, x: Tensor, at: Tensor, state: KVState) -> Tensor:
        batch, new, _ = x.shape
        rotated = self.heads + self.kv_heads
        qkv = layer.qkv(x).view(batch, new, -1, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(qkv[:, :, : self.heads], layer.q_norm, eps=self.eps)
            k = rms_norm(qkv[:, :, self.heads : rotated], layer.k_norm, eps=self.eps)
            qkv = torch.cat([q, k, qkv[:, :, rotated:]], 2)
        qkv = qkv.transpose(1, 2)
        turn = self.rotation
        qk = rope(qkv[:, :rotated], at, turn.inv_freq, attention_scaling=turn.scaling)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        found = state.attend(index, q, k, qkv[:, rotated:], self.scoring)
        return layer.out(with_sinks(found, None).transpose(1, 2).reshape(batch, new, -1))

    def _layer(self, weights: Checkpoint, index: int) -> _Layer:
        name = f"model.layers.{index}."
        return _Layer(
            weights[name + "input_layernorm.weight"],
            weights.get(name + "self_attn.q_norm.weight"),
            weights.get(name + "self_attn.k_norm.weight"),
            weights[name + "post_attention_layernorm.weight"],
            **{part: weights.joined([name + one for one in names]) for part, names in JOINED.items()},
        )
