"""Stretched rotary positions are those of transformers' own implementation, in both kinds of bodies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.body import Body
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method
from agentctx.runtime.rotation import RopeScaling
from agentctx.runtime.state import KVState

TRAINED, FACTOR = 256, 4.0
THETA = 10000.0
PARAMETERS: dict[str, dict[str, Any]] = {  # of transformers, for head size 16
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "ntk": {"rope_type": "default", "rope_theta": THETA * FACTOR ** (16 / 14)},
    "yarn": {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED},
}


def ours(folder: Path) -> Body:
    tiny.tiny("Llama", max_position_embeddings=TRAINED).save_pretrained(folder)
    return LlamaDecoder.load(folder, torch.float32)


def theirs(_: Path) -> Body:
    return HFBody(tiny.tiny("Llama", max_position_embeddings=TRAINED))


def logits(body: Body, ids: Any, attention: str) -> Tensor:
    body, some = method(attention).on(body)
    pool = PagePool(body.shape, budget=1 << 24)
    state = KVState(pool, [BlockTable(pool)], some, [0])
    with torch.inference_mode():
        return torch.cat([body.logits(body.forward(piece, state)) for piece in ids.split(200, 1)], 1)


@pytest.mark.parametrize("body", [ours, theirs])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_as_transformers_does(kind: str, body: Callable[[Path], Body], tmp_path: Path) -> None:
    rope = {"rope_theta": THETA} | PARAMETERS[kind]
    stock = tiny.tiny("Llama", max_position_embeddings=int(TRAINED * FACTOR), rope_parameters=rope)
    ids = torch.randint(97, (1, 900), generator=torch.Generator().manual_seed(1))
    want = stock(ids, use_cache=False).logits
    got = logits(body(tmp_path), ids, f"ropescale:kind={kind},factor={FACTOR}")
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    plain = logits(body(tmp_path / "plain"), ids, "dense")
    assert not torch.allclose(plain, want, atol=0.1)


@pytest.mark.parametrize("body", [ours, theirs])
def test_the_window_grows_and_the_model_stays(body: Callable[[Path], Body], tmp_path: Path) -> None:
    some = body(tmp_path)
    assert some.rescaled(RopeScaling("yarn", 2.5)).window == 640
    assert some.window == TRAINED


def test_keys_that_are_moved_under_yarn_are_those_of_their_new_position(tmp_path: Path) -> None:
    """The probe finds the stretched table and its factor: streaming gives the same through both bodies."""
    ids = torch.randint(97, (1, 700), generator=torch.Generator().manual_seed(2))
    text = "ropescale:kind=yarn,factor=4+streaming:window=200"
    found = [logits(body(tmp_path), ids, text) for body in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt-oss", "gemma3", "phi3-longrope"])
def test_a_model_with_other_tables_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="not one plain table") as failed:
        HFBody(tiny.FAMILIES[family]()).rescaled(RopeScaling("yarn", 2))
    assert failed.value.code == "unsupported"
