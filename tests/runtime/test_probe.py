"""The probe says how keys are turned, and moving keys by what it says gives the keys at the new positions."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache

from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.hf.probe import probe
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method
from agentctx.runtime.rotation import Rotation

LAYOUTS = {
    "llama": [(16, "half")] * 2,
    "qwen3": [(32, "half")] * 2,
    "gemma2": [(16, "half")] * 2,
    "gemma3": [(16, "half")] * 2,
    "phi": [(8, "half")] * 2,
    "phi3-longrope": [(16, "half")] * 2,
    "smollm3": [(16, "half"), (0, "half")] * 2,
    "gpt-oss": [(16, "half")] * 2,
    "cohere": [(16, "interleaved")] * 2,
    "glm": [(8, "interleaved")] * 2,
}


def _make(family: str) -> Any:
    if family == "glm":
        return tiny.tiny("Glm", head_dim=16, partial_rotary_factor=0.5)
    return tiny.FAMILIES[family]()


def _keys(model: Any, first: int, rows: int = 6) -> list[Tensor]:
    """Keys `[rows, Hkv, 1, D]` by layer, of lone tokens at positions `first`, `first` + 40, and so on."""
    cache = DynamicCache()
    places = first + 40 * torch.arange(rows)
    with torch.inference_mode():
        model.base_model(
            torch.arange(5, 5 + rows)[:, None], position_ids=places[:, None], past_key_values=cache
        )
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("family", LAYOUTS)
def test_moved_keys_are_the_keys_of_the_new_positions(family: str) -> None:
    model = _make(family)
    rotations = probe(model, tiny.LONG_FROM)
    assert [found and (found.rotary_dim, found.style) for found in rotations] == LAYOUTS[family]
    old, new = 40 * torch.arange(6)[:, None], 700 + 40 * torch.arange(6)[:, None]
    for rotation, held, wanted in zip(rotations, _keys(model, 0), _keys(model, 700), strict=True):
        assert rotation is not None
        torch.testing.assert_close(rotation.move(held, old, new), wanted, atol=1e-4, rtol=0)


def test_layers_with_tables_of_their_own() -> None:
    near, far = probe(_make("gemma3"), 4096)
    assert near is not None and far is not None
    assert near.inv_freq[-1] > 2 * far.inv_freq[-1]


def test_the_factor_of_yarn_is_told() -> None:
    rotation = probe(_make("gpt-oss"), 4096)[0]
    assert rotation is not None
    assert rotation.scaling == pytest.approx(0.1 * torch.log(torch.tensor(8.0)).item() + 1)


def test_bfloat16_keys_are_explained() -> None:
    rotations = probe(_make("phi").to(torch.bfloat16), 4096)
    assert [found and found.rotary_dim for found in rotations] == [8, 8]


def test_a_rotation_that_no_table_explains_is_unknown() -> None:
    model = _make("llama")
    turn = model.model.rotary_emb.forward

    def warped(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = turn(x, position_ids + position_ids**2)
        return cos, sin

    model.model.rotary_emb.forward = warped
    assert probe(model, 4096) == (None, None)


def test_learned_positions_are_not_a_rotation() -> None:
    """They change the keys of every position in a way that no rotation undoes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)).eval()
    assert probe(model, 1024) == (None, None)


def test_no_rotation_moves_nothing() -> None:
    keys = torch.randn(1, 2, 3, 8)
    still = Rotation(torch.zeros(0), rotary_dim=0)
    assert still.move(keys, torch.arange(3), torch.arange(3) + 9) is keys


def test_a_method_that_moves_positions_runs_on_what_was_found() -> None:
    """The same ids as the runtime's own decoder, which knows its rotation."""
    model = tiny.tiny("Llama")
    ids = torch.randint(2, 97, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    tensors = {name: weight.clone() for name, weight in model.state_dict().items()}
    own = LlamaDecoder(model.config.to_dict(), tensors, torch.float32)
    found = []
    for body in (own, HFBody(model)):
        engine = Engine(
            body, fingerprint="tiny", memory_bytes=16 << 20, method=method("streaming:window=100")
        )
        _, hidden = engine.begin(ids)
        assert hidden is not None
        found.append(engine.logits(hidden))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
