"""The plain decoder that most models are: Llama, Mistral without a window, Qwen 2 and 3.

Reads a folder of safetensors itself, so that a command line tool starts in the time that torch takes to
import; transformers' model code imports torch's compiler and its distributed tensors, three times as much.
It also runs ahead of it: Q, K and V are one product, gate and up another, and a step is some fourteen
operators a layer. What is not exactly this architecture goes through `runtime/hf`; `supports` says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.rope import rope
from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import KVShape
from agentctx.runtime.layer import Scoring, with_sinks
from agentctx.runtime.linear import Linear
from agentctx.runtime.state import KVState

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def supports(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes this architecture and nothing beyond it."""
    rope_type = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get(
        "rope_type", "default"
    )
    return (
        config.get("model_type") in FAMILIES
        and rope_type == "default"
        and config.get("hidden_act", "silu") == "silu"
        and (config.get("sliding_window") is None or not config.get("use_sliding_window", True))
        and "quantization_config" not in config
    )


@dataclass(slots=True)
class _Layer:
    before: Tensor  # weight of the norm before attention
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    after: Tensor
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
        self.inv_freq = 1.0 / (theta ** (steps / self.head_dim))
        self.scoring = Scoring(self.head_dim**-0.5)
        weights = _Weights(tensors, dtype)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        tied = config.get("tie_word_embeddings", False) or "lm_head.weight" not in tensors
        self.head = Linear(self.embedding if tied else weights["lm_head.weight"])
        self.layers = [self._layer(weights, index) for index in range(self.shape.layers)]
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors.values())

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> LlamaDecoder:
        """Read a folder whose config `supports` accepts.

        Raises ModelError for a tensor that is missing or a shard that is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_bytes())
        tensors: dict[str, Tensor] = {}
        try:
            for shard in sorted(folder.glob("*.safetensors")):
                tensors |= load_file(shard)
            return cls(config, tensors, dtype)
        except KeyError as error:
            raise ModelError(
                f"the weights in {folder} cannot be loaded: they lack the tensor {error.args[0]}",
                hint="are all its files complete?",
            ) from error
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"the weights in {folder} cannot be loaded: {error}", hint="are all its files complete?"
            ) from error

    def forward(self, ids: Tensor, state: KVState) -> Tensor:
        """See `Body`."""
        x = F.embedding(ids, self.embedding)
        at = state.positions(ids.shape[1]).to(torch.int32)
        for index, layer in enumerate(self.layers):
            x = x + self._attend(index, layer, F.rms_norm(x, x.shape[-1:], layer.before, self.eps), at, state)
            gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.after, self.eps)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Body`."""
        return self.head(hidden)

    def _attend(self, index: int, layer: _Layer, x: Tensor, at: Tensor, state: KVState) -> Tensor:
        batch, new, _ = x.shape
        rotated = self.heads + self.kv_heads
        qkv = layer.qkv(x).view(batch, new, -1, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(qkv[:, :, : self.heads], (self.head_dim,), layer.q_norm, self.eps)
            k = F.rms_norm(qkv[:, :, self.heads : rotated], (self.head_dim,), layer.k_norm, self.eps)
            qkv = torch.cat([q, k, qkv[:, :, rotated:]], 2)
        qkv = qkv.transpose(1, 2)
        qk = rope(qkv[:, :rotated], at, self.inv_freq)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        found = state.attend(index, q, k, qkv[:, rotated:], self.scoring)
        return layer.out(with_sinks(found, None).transpose(1, 2).reshape(batch, new, -1))

    def _layer(self, weights: _Weights, index: int) -> _Layer:
        name = f"model.layers.{index}."
        attention, mlp = name + "self_attn.", name + "mlp."
        return _Layer(
            weights[name + "input_layernorm.weight"],
            weights.joined([attention + part for part in ("q_proj", "k_proj", "v_proj")]),
            weights.get(attention + "q_norm.weight"),
            weights.get(attention + "k_norm.weight"),
            weights.joined([attention + "o_proj"]),
            weights[name + "post_attention_layernorm.weight"],
            weights.joined([mlp + "gate_proj", mlp + "up_proj"]),
            weights.joined([mlp + "down_proj"]),
        )


class _Weights:
    """Tensors by name, in one dtype."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtype)

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self._tensors else None

    def joined(self, names: list[str]) -> Linear:
        """Several products over one input as one."""
        weight = [self[f"{name}.weight"] for name in names]
        bias = [self[f"{name}.bias"] for name in names if f"{name}.bias" in self._tensors]
        return Linear(torch.cat(weight) if len(weight) > 1 else weight[0], torch.cat(bias) if bias else None)
