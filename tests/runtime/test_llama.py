"""The decoder that is ours from end to end against transformers' model code, and folders that are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from agentctx.memory.errors import ModelError
from agentctx.models.weights import Weights
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder, supports

LENGTH = 300
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.tiny("Llama"),
    "llama-tied": lambda: tiny.tiny("Llama", tie_word_embeddings=True),
    "llama-biases": lambda: tiny.tiny("Llama", attention_bias=True, mlp_bias=True, head_dim=32),
    "mistral": lambda: tiny.tiny("Mistral", sliding_window=None),
    "qwen2": lambda: tiny.tiny("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: tiny.tiny("Qwen3", head_dim=32),
    "qwen3-biases": lambda: tiny.tiny("Qwen3", head_dim=16, attention_bias=True),
}


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _answers(decoder: LlamaDecoder, ids: Tensor) -> Tensor:
    """Logits `[T, V]` of every token, fed in pieces."""
    engine = Engine(decoder, fingerprint="tiny", memory_bytes=1 << 24)
    context = engine.read(ids[:1].tolist())
    steps = [engine.step([context], piece[None]) for piece in ids[1:].split([127, 1, 128, LENGTH - 257])]
    first = engine.begin(ids[:1].tolist())[1]
    assert first is not None
    return engine.logits(torch.cat([first[None], *(step[0] for step in steps)]))


@pytest.mark.parametrize("name", MODELS)
def test_it_answers_what_transformers_answers(name: str, tmp_path: Path) -> None:
    folder = _saved(MODELS[name](), tmp_path)
    model = MODELS[name]()
    ids = torch.randint(2, 97, (LENGTH,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        exact = model(ids[None]).logits[0]
        rounded = model.to(torch.bfloat16)(ids[None]).logits[0].float()
    assert supports(json.loads((folder / "config.json").read_bytes()))
    found = _answers(LlamaDecoder.load(folder, torch.float32), ids)
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    coarse = _answers(LlamaDecoder.load(folder, torch.bfloat16), ids)
    assert (coarse - exact).norm() <= 1.2 * (rounded - exact).norm()  # no worse than the model's own rounding


REFUSED: dict[str, dict[str, Any]] = {
    "another family": {"model_type": "gemma2"},
    "a window": {"model_type": "mistral", "sliding_window": 100},
    "a window by default": {"model_type": "mistral"},
    "windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100},
    "layers of several kinds": {"layer_types": ["full_attention", "sliding_attention"]},
    "scaled positions": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
    "scaled positions, as once written": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "positions by layer": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "partial rotation": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "another activation": {"hidden_act": "gelu"},
    "quantized": {"quantization_config": {"quant_method": "gptq"}},
    "no head size": {"model_type": "qwen3", "head_dim": None},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_does_not_support_goes_to_transformers(what: str) -> None:
    config = json.loads(tiny.tiny("Llama").config.to_json_string(use_diff=False))
    assert supports(config)
    changed = {key: value for key, value in (config | REFUSED[what]).items() if value is not None}
    assert not supports(changed)


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _reshape(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:16].contiguous()


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", _drop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
        ("llama", _drop("lm_head.weight"), "lm_head.weight is missing"),
        ("llama", _drop("model.norm.weight"), "model.norm.weight is missing"),
        ("qwen2", _drop("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias is missing"),
        ("qwen3", _drop("model.layers.1.self_attn.q_norm.weight"), "q_norm.weight is missing"),
        ("llama", _reshape, r"k_proj.weight is \[16, 64\], the config asks for \[32, 64\]"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit(
    family: str, change: Callable[[dict[str, Tensor]], None], reason: str, tmp_path: Path
) -> None:
    folder = _saved(MODELS[family](), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=reason) as raised:
        LlamaDecoder.load(folder, torch.float32)
    assert raised.value.hint


def _absent(shard: Path) -> None:
    shard.unlink()


def _short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def _garbled(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[8:40] = bytes(32)  # of the header
    shard.write_bytes(content)


@pytest.mark.parametrize("damage", [_absent, _short, _garbled])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_damaged_shards(family: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Whichever of the two bodies reads them."""
    model = tiny.tiny(family, head_dim=16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    damage(shards[1])
    with pytest.raises(ModelError) as raised:
        Weights.load(tmp_path, name="tiny")
    assert str(tmp_path) in raised.value.message
    if family == "Llama":
        with pytest.raises(ModelError, match=shards[1].name):
            LlamaDecoder.load(tmp_path, torch.float32)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    folder = _saved(tiny.tiny("Llama"), tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"not for us")
    LlamaDecoder.load(folder, torch.float32)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_the_files_of_a_tied_model(same: bool, tmp_path: Path) -> None:
    folder = _saved(MODELS["llama-tied"](), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    words = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = words.clone() if same else words.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    decoder = LlamaDecoder.load(folder, torch.float32)
    assert torch.equal(decoder.head.weight, tensors["lm_head.weight"])
    assert (decoder.head.weight is decoder.embedding) == same
    hidden = torch.randn(3, 64)
    stock = LlamaForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.testing.assert_close(decoder.logits(hidden), stock.lm_head(hidden))


def test_weights_count_as_they_are_held_not_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny.tiny("Llama")
    numbers = sum(weight.numel() for weight in model.parameters())
    folder = _saved(model.to(torch.bfloat16), tmp_path)
    assert LlamaDecoder.load(folder, torch.float32).weight_bytes == 4 * numbers
    assert LlamaDecoder.load(folder, torch.bfloat16).weight_bytes == 2 * numbers
