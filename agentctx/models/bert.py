"""A BERT encoder whose mean row stands for a text (Devlin et al., arXiv 1810.04805; Sentence-BERT, Reimers
and Gurevych, arXiv 1908.10084).

In plain torch: transformers' own class gives the same numbers (tests/agentctx/models/test_embedding.py), and
importing it takes longer than all that is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.vectors import Floats
from agentctx.models.tokenizer import Tokenizer

TOKENS = 256  # of a text: what sentence-transformers' models are trained and used with
_BATCH_TOKENS = 4096  # tokens of one pass, padding included


class BertEncoder:
    """Texts to unit vectors. Safe for several threads."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Tokenizer
    ) -> None:
        """Raises KeyError for what `config` lacks, ValueError for a model of another kind."""
        kind = (config["model_type"], config["hidden_act"], config.get("position_embedding_type", "absolute"))
        if kind != ("bert", "gelu", "absolute"):
            raise ValueError(f"it is no BERT as it was published, but {kind}")
        self.size: int = config["hidden_size"]
        self._heads: int = config["num_attention_heads"]
        self._layers: int = config["num_hidden_layers"]
        self._eps: float = config["layer_norm_eps"]
        self._weights = weights
        self._tokenizer = tokenizer.backend
        self._tokenizer.enable_truncation(min(TOKENS, config["max_position_embeddings"]))

    @classmethod
    def load(cls, folder: Path) -> BertEncoder:
        """Read a folder with config.json, model.safetensors and tokenizer.json. Raises ModelError."""
        try:
            config = json.loads((folder / "config.json").read_bytes())
            weights = load_file(folder / "model.safetensors")
            encoder = cls(
                config, {name: one.float() for name, one in weights.items()}, Tokenizer.load(folder)
            )
            encoder.encode(["x"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} does not hold a model that embeds texts: {error}",
                hint="name minilm, or the folder of a BERT with safetensors and tokenizer.json",
            ) from error
        return encoder

    def encode(self, texts: Sequence[str]) -> Floats:
        """Unit vectors float32 `[len(texts), size]`; of a text the first `TOKENS` tokens count."""
        encoded = [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]
        found = np.zeros((len(texts), self.size), np.float32)
        with torch.inference_mode():
            for places in _batches(encoded):
                found[places] = self._pooled([encoded[place] for place in places]).numpy()
        return found

    def _pooled(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        hidden = self._forward(ids, real)
        return F.normalize((hidden * real[..., None]).sum(1), dim=-1)  # of the mean: lengths fall out

    def _forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """The last layer, float32 `[n, t, size]`; `real [n, t]` is False for padding."""
        rows = self._weights["embeddings.word_embeddings.weight"][ids]
        rows = rows + self._weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        rows = rows + self._weights["embeddings.token_type_embeddings.weight"][0]
        rows = self._norm(rows, "embeddings.LayerNorm")
        for layer in range(self._layers):
            at = f"encoder.layer.{layer}"
            rows = self._norm(rows + self._attended(rows, real, at), f"{at}.attention.output.LayerNorm")
            inner = F.gelu(self._linear(rows, f"{at}.intermediate.dense"))
            rows = self._norm(rows + self._linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return rows

    def _attended(self, rows: Tensor, real: Tensor, at: str) -> Tensor:
        shape = (*rows.shape[:-1], self._heads, -1)
        query, key, value = (
            self._linear(rows, f"{at}.attention.self.{name}").view(*shape).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
        return self._linear(seen.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")

    def _linear(self, rows: Tensor, name: str) -> Tensor:
        return F.linear(rows, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(rows, (self.size,), weight, bias, self._eps)


def _batches(encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of texts of similar length, so that little is padding."""
    batch: list[int] = []
    for place in sorted(range(len(encoded)), key=lambda place: len(encoded[place])):
        if batch and (len(batch) + 1) * len(encoded[place]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
