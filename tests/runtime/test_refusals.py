"""What cannot be right is refused by name, when a model is taken over or with the first wrong argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PagePool
from agentctx.runtime.hf.attention import NAME
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.hf.cache import PagedCache

IDS = torch.arange(2, 42)[None]


def _falcon() -> Any:
    return FalconForCausalLM(
        FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1))


def _deepseek() -> Any:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    return tiny.tiny(
        "DeepseekV3",
        **latent,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=8,
    )


def _chunked() -> Any:
    return tiny.tiny("Llama", layer_types=["chunked_attention", "full_attention"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_falcon, "does not take an attention function"),
        (_t5, "has an encoder"),
        (_deepseek, "compressed keys"),
        (lambda: tiny.tiny("DiffLlama"), "its logits would change by"),
        (_chunked, "keys in chunks"),
    ],
)
def test_models_that_cannot_run_are_named(make: Callable[[], Any], reason: str) -> None:
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason) as raised:
        HFBody(model)
    assert raised.value.code == "unsupported"
    assert type(model).__name__ in raised.value.message
    assert model.config._attn_implementation == before


class _Copying(modeling_llama.LlamaAttention):
    """Attention whose keys are copied between the cache and the attention function."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, past_key_values=past_key_values and _Copies(past_key_values), **kwargs)


class _Copies:
    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
        key, value = self.cache.update(key, value, *where)
        return key.clone(), value


class _Capped(modeling_llama.LlamaAttention):
    """Attention with an argument of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, temperature=2.0, **kwargs)


class _Doubled(nn.Linear):
    """A head behind which the model does something that nobody declared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[1] > 8 else 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(_Copying, "does not hand its keys"), (_Capped, "the attention argument temperature")],
)
def test_attention_of_an_unknown_kind_is_found_when_the_model_is_taken_over(
    kind: type[nn.Module], reason: str
) -> None:
    model = tiny.tiny("Llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    with pytest.raises(ModelError, match=reason) as raised:
        HFBody(model)
    assert raised.value.code == "unsupported"
    assert model.config._attn_implementation == "sdpa"
    model(IDS)  # and it still has its own attention


def test_logits_made_in_another_way_are_found() -> None:
    model = tiny.tiny("Llama")
    model.lm_head.__class__ = _Doubled
    with pytest.raises(ModelError, match="logits would change by") as raised:
        HFBody(model)
    assert raised.value.code == "unsupported"


def test_keys_that_lose_their_mark_later_raise_before_a_token_is_wrong() -> None:
    model = tiny.tiny("Llama")
    body = HFBody(model)
    model.model.layers[
        -1
    ].self_attn.__class__ = _Copying  # the last: nothing after it in the pass would see it
    cache = _cache(body)
    model(IDS, past_key_values=cache)
    with pytest.raises(ModelError, match="layer 1 of this model does not hand its keys"):
        model(IDS, past_key_values=cache)


def _cache(body: HFBody) -> PagedCache:
    return PagedCache(PagePool(body.shape, budget=1 << 22))


@pytest.fixture(scope="module")
def body() -> HFBody:
    return HFBody(tiny.tiny("Llama", attention_dropout=0.5))


RIGHT = torch.arange(40)[None] < 30
HOLE = torch.arange(40)[None] != 20
TREE = torch.zeros(1, 1, 40, 40)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": RIGHT.long()}, "hides tokens after the first shown one"),
        ({"attention_mask": HOLE.long()}, "hides tokens after the first shown one"),
        ({"attention_mask": TREE}, r"a mask of shape \[1, 1, 40, 40\]"),
        ({"is_causal": False}, "a mask that is not causal"),
        ({"head_mask": torch.ones(4)}, "the attention argument head_mask"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_arguments_that_change_the_answer_are_named(
    body: HFBody, options: dict[str, Any], reason: str, cached: bool
) -> None:
    with pytest.raises(ModelError, match=reason) as raised:
        body.model(IDS, past_key_values=_cache(body) if cached else None, use_cache=cached, **options)
    assert raised.value.code == "unsupported"
    assert raised.value.hint


def test_packed_texts_are_refused(body: HFBody) -> None:
    with pytest.raises(ModelError, match="not causal"):
        body.model(IDS, position_ids=torch.arange(40)[None] % 20, use_cache=False)


def test_training_is_refused(body: HFBody) -> None:
    body.model.train()
    try:
        with pytest.raises(ModelError, match="dropout"):
            body.model(IDS)
    finally:
        body.model.eval()


def test_a_mask_that_hides_what_the_cache_holds_is_refused(body: HFBody) -> None:
    cache = _cache(body)
    body.model(IDS, past_key_values=cache)
    later = torch.ones(1, 41, dtype=torch.long)
    later[0, :5] = 0
    with pytest.raises(ModelError, match="hides tokens that the cache holds"):
        body.model(IDS[:, :1], past_key_values=cache, attention_mask=later)


def test_another_batch_is_refused(body: HFBody) -> None:
    cache = _cache(body)
    body.model(IDS, past_key_values=cache)
    with pytest.raises(ModelError, match="holds 1 rows, the batch has 2"):
        body.model(IDS.repeat(2, 1), past_key_values=cache)


def test_a_cache_of_fixed_size_is_refused_and_a_growing_one_works(body: HFBody) -> None:
    with pytest.raises(ModelError, match="a cache of a fixed size"):
        body.model(IDS, past_key_values=StaticCache(body.model.config, max_cache_len=64))
    own = DynamicCache(config=body.model.config)
    body.model(IDS[:, :30], past_key_values=own)
    found = body.model(IDS[:, 30:], past_key_values=own).logits
    torch.testing.assert_close(found, body.model(IDS, use_cache=False).logits[:, 30:])


def test_padding_and_a_window_with_the_models_own_cache() -> None:
    body = HFBody(tiny.FAMILIES["mistral-window"]())
    ids = torch.randint(2, 97, (2, 160), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(160) >= torch.tensor([[0], [55]])).long()

    def generated(attention: str) -> Tensor:
        body.model.set_attn_implementation(attention)
        found: Tensor = body.model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=1
        )
        return found

    assert torch.equal(generated(NAME), generated("eager"))
