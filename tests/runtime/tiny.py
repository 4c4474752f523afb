"""Tiny random models of every family that the runtime must serve, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers

SIZE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
)
LONG_FROM = 1024  # tokens from which the longrope model takes its other table
TEXT = MappingProxyType({"Gemma3": "Gemma3Text"})
ALTERNATING = ["sliding_attention", "full_attention"]


def tiny(family: str, **settings: Any) -> Any:
    """A causal language model of random weights; `settings` go to its config."""
    config = getattr(transformers, f"{TEXT.get(family, family)}Config")(**{**SIZE, **settings})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():  # far enough from zero that attention is not flat
        if "norm" not in name:
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
        if name.endswith((".bias", "sinks")) or "norm" in name:
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def _phi3() -> Any:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LONG_FROM}
    return tiny("Phi3", rope_parameters=rope | factors, original_max_position_embeddings=LONG_FROM)


def _gpt_oss() -> Any:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"original_max_position_embeddings": 512, "truncate": False}
    return tiny(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=ALTERNATING,
        rope_parameters=yarn,
    )


FAMILIES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "llama": lambda: tiny("Llama"),
        "mistral": lambda: tiny("Mistral", sliding_window=None),
        "mistral-window": lambda: tiny("Mistral", sliding_window=100),
        "qwen2": lambda: tiny("Qwen2"),
        "qwen2-window": lambda: tiny(
            "Qwen2", use_sliding_window=True, sliding_window=70, layer_types=ALTERNATING
        ),
        "qwen3": lambda: tiny("Qwen3", head_dim=32),
        "gemma2": lambda: tiny(
            "Gemma2", head_dim=16, sliding_window=100, query_pre_attn_scalar=24, attn_logit_softcapping=5.0
        ),
        "gemma3": lambda: tiny(
            "Gemma3", head_dim=16, sliding_window=64, query_pre_attn_scalar=24, layer_types=ALTERNATING
        ),
        "phi": lambda: tiny("Phi", partial_rotary_factor=0.5),
        "phi3-longrope": _phi3,
        "smollm3": lambda: tiny("SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2),
        "gpt-oss": _gpt_oss,
        "granite": lambda: tiny("Granite", logits_scaling=4.0, attention_multiplier=0.1),
        "cohere": lambda: tiny("Cohere", logit_scale=0.25),  # interleaved rotation
    }
)
