"""The tensors of a Llama-like model: read from their files, and handed out only if they are what the config
says. A tensor that is missing, or of another shape, is an error here, not noise in an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.runtime.linear import Linear

INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, in the dtype they are stored in: of the shards that its index lists.

    Raises ModelError for a file that is missing, cut short or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    shard = INDEX
    try:
        for shard in _shards(folder):
            tensors |= load_file(folder / shard)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(f"{folder / shard} cannot be loaded: {error}") from error
    return tensors


def _shards(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))


class Checkpoint:
    """Tensors by name, in one dtype. Raises ModelError for one that is missing or does not fit `config`."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, config: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._shapes = _shapes(config)
        self._biased = _biased(config)
        self._normed = config["model_type"] == "qwen3"

    def __getitem__(self, name: str) -> Tensor:
        part, kind = name.rsplit(".", 2)[-2:]
        needed = self._shapes[part][: 1 if kind == "bias" else None]
        found = self._tensors.get(name)
        if found is None:
            raise _broken(f"the tensor {name} is missing")
        if tuple(found.shape) != needed:
            raise _broken(f"the tensor {name} is {list(found.shape)}, the config asks for {list(needed)}")
        return found.to(self._dtype)

    def get(self, name: str) -> Tensor | None:
        """A norm of queries or keys, where the family has them."""
        return self[name] if self._normed else None

    def joined(self, names: Sequence[str]) -> Linear:
        """Several products over one input as one."""
        weight = [self[f"{name}.weight"] for name in names]
        bias = [self[f"{name}.bias"] for name in names if name.rpartition(".")[2] in self._biased]
        return Linear(torch.cat(weight) if len(weight) > 1 else weight[0], torch.cat(bias) if bias else None)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the weights, by the last part of their names."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    words = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": words,
        "lm_head": words,
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    shapes |= dict.fromkeys(("q_norm", "k_norm"), (size,))
    shapes |= dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), (hidden,))
    return shapes


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    """The products that add a bias. What transformers hard-codes for a family is not in its config."""
    family = config["model_type"]
    if family == "qwen2":
        return frozenset({"q_proj", "k_proj", "v_proj"})
    found: set[str] = set()
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        found |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if family == "llama" and config.get("mlp_bias"):
        found |= {"gate_proj", "up_proj", "down_proj"}
    return frozenset(found)


def _broken(what: str) -> ModelError:
    return ModelError(what, hint="are all files of the model complete?")
