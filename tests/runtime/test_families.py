"""Every family of decoders answers through our attention what it answers through its own.

The reference is transformers' eager attention, which for a window or a cap materialises every weight.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.store import BlockStore
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.attention import NAME
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.hf.cache import PagedCache

LENGTH = 330  # six pages, and more than twice any window
CLOSE = 2e-5
MEMORY = 1 << 25


@dataclass
class Case:
    """A model, its own answers, and the body that runs it on our attention."""

    model: Any
    body: HFBody
    ids: Tensor  # [2, LENGTH]
    logits: Tensor  # of the model's own attention

    def cache(self) -> PagedCache:
        return PagedCache(PagePool(self.body.shape, budget=MEMORY))

    def engine(self, store: BlockStore | None = None) -> Engine:
        return Engine(self.body, fingerprint="tiny", memory_bytes=MEMORY, store=store)

    def fed(self, sizes: Sequence[int], cache: PagedCache) -> Tensor:
        """Logits of `ids`, fed in pieces of these sizes."""
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        pieces = [self.ids[:, start:end] for start, end in pairwise(ends)]
        with torch.inference_mode():
            return torch.cat([self.model(piece, past_key_values=cache).logits for piece in pieces], 1)

    def generated(self, ids: Tensor, attention: str, **options: Any) -> list[list[int]]:
        """Token ids that `generate` adds, with a cache of ours or transformers' own."""
        self.model.set_attn_implementation(attention)
        if attention == NAME:
            options["past_key_values"] = self.cache()
        try:
            out = self.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1, **options)
        finally:
            self.model.set_attn_implementation(NAME)
        return [row[ids.shape[1] :].tolist() for row in out]


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model = tiny.FAMILIES[request.param]()
    ids = torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
    yield Case(model, HFBody(model), ids, logits)
    gc.collect()


@pytest.mark.parametrize("size", [LENGTH, 128, 37])
def test_logits_are_the_models_own_whatever_the_pieces(case: Case, size: int) -> None:
    sizes = [min(size, LENGTH - start) for start in range(0, LENGTH, size)]
    found = case.fed(sizes, case.cache())
    torch.testing.assert_close(found, case.logits, atol=CLOSE, rtol=0)
    assert torch.equal(found.argmax(-1), case.logits.argmax(-1))


@settings(deadline=None, derandomize=True, max_examples=2, suppress_health_check=list(HealthCheck))
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=6))
def test_logits_do_not_depend_on_where_a_text_is_cut(case: Case, cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), LENGTH]
    found = case.fed([end - start for start, end in pairwise(edges)], case.cache())
    torch.testing.assert_close(found, case.logits, atol=CLOSE, rtol=0)


def test_a_pass_without_a_cache_is_the_models_own(case: Case) -> None:
    with torch.inference_mode():
        found = case.model(case.ids, use_cache=False).logits
    torch.testing.assert_close(found, case.logits, atol=CLOSE, rtol=0)


def test_a_padded_batch_generates_what_its_rows_generate_alone(case: Case) -> None:
    pads = (0, 71)
    ids = case.ids.clone()
    ids[1, :71] = 1
    shown = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    together = case.generated(ids, NAME, attention_mask=shown)
    assert together == case.generated(ids, "eager", attention_mask=shown)
    for row, pad in enumerate(pads):
        alone = ids[row : row + 1, pad:]
        assert case.generated(alone, NAME, attention_mask=torch.ones_like(alone)) == [together[row]]


def test_beams(case: Case) -> None:
    options = {"num_beams": 2, "attention_mask": torch.ones_like(case.ids)}
    assert case.generated(case.ids, NAME, **options) == case.generated(case.ids, "eager", **options)


def test_rows_that_are_chosen_go_on_from_their_own_past(case: Case) -> None:
    """What beams do: rows change places and split, padding and all; then each writes to its own pages."""
    pads = torch.tensor([0, 71])
    shown = (torch.arange(LENGTH) >= pads[:, None]).long()
    cache = case.cache()
    with torch.inference_mode():
        at = (shown.cumsum(1) - 1).clamp_min(0)
        first = shown[:, :200]
        case.model(case.ids[:, :200], attention_mask=first, position_ids=at[:, :200], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        rows, tails = [1, 1, 0, 0], [0, 1, 0, 1]
        ids, mask = case.ids[tails, 200:], shown[rows]
        found = case.model(
            ids, attention_mask=mask, position_ids=at[rows, 200:], past_key_values=cache
        ).logits
        for row, tail, logits in zip(rows, tails, found, strict=True):
            alone = torch.cat([case.ids[row, pads[row] : 200], case.ids[tail, 200:]])
            wanted = case.model(alone[None], use_cache=False).logits[0, 200 - LENGTH :]
            torch.testing.assert_close(logits, wanted, atol=CLOSE, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.pool.used_pages == 0


def test_cropped_and_fed_again_is_as_if_never_cropped(case: Case) -> None:
    cache = case.cache()
    case.fed([250, 50], cache)
    for remove in (50, 0, 33):  # to within a page, and not at all
        cache.crop(-remove)
        held = cache.get_seq_length()
        with torch.inference_mode():
            again = case.model(case.ids[:, held:300], past_key_values=cache).logits if held < 300 else None
        if again is not None:
            torch.testing.assert_close(again, case.logits[:, held:300], atol=CLOSE, rtol=0)
    with torch.inference_mode():
        rest = case.model(case.ids[:, 300:], past_key_values=cache).logits
    torch.testing.assert_close(rest, case.logits[:, 300:], atol=CLOSE, rtol=0)


def test_the_engine_reads_in_pieces_and_forks(case: Case) -> None:
    engine = case.engine()
    first, second = case.ids.tolist()
    parent = engine.read(first[:210])
    held = [engine.pool.read(page, 64) for page in parent.table.pages]
    for tail in (first[210:], second[:50]):
        child = parent.fork()
        hidden = child.feed(tail)
        alone = case.engine().begin(first[:210] + tail)[1]
        assert hidden is not None and alone is not None
        torch.testing.assert_close(engine.logits(hidden), engine.logits(alone), atol=CLOSE, rtol=0)
        if tail == first[210:]:
            torch.testing.assert_close(engine.logits(hidden), case.logits[0, -1], atol=CLOSE, rtol=0)
    for page, (k, v) in zip(parent.table.pages, held, strict=True):
        assert all(map(torch.equal, engine.pool.read(page, 64), (k, v)))
    together = engine.read_all([first[:150], second[:77], second[:140]])
    for context, end in zip(together, (first[150], second[77], second[140]), strict=True):
        hidden = context.fork().feed([end])
        alone = case.engine().begin([*context.ids, end])[1]
        assert hidden is not None and alone is not None
        torch.testing.assert_close(engine.logits(hidden), engine.logits(alone), atol=CLOSE, rtol=0)


def test_what_was_saved_is_read_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    ids = case.ids[0].tolist()
    store = BlockStore(tmp_path, "tiny", budget=MEMORY)
    engine, later = case.engine(store), case.engine(store)
    read = engine.read(ids, keep=True)
    again, hidden = later.begin(ids)
    assert again.reused == 320
    for mine, other in zip(read.table.pages[:5], again.table.pages[:5], strict=True):
        assert all(map(torch.equal, engine.pool.read(mine, 64), later.pool.read(other, 64)))
    assert hidden is not None
    torch.testing.assert_close(later.logits(hidden), case.logits[0, -1], atol=CLOSE, rtol=0)


def test_longrope_is_read_within_its_first_table() -> None:
    body = HFBody(tiny.FAMILIES["phi3-longrope"]())
    engine = Engine(body, fingerprint="tiny", memory_bytes=MEMORY)
    with pytest.raises(ModelError, match=f"the model's window of {tiny.LONG_FROM:,}") as raised:
        engine.read([5] * (tiny.LONG_FROM + 1))
    assert raised.value.code == "overflow"


def test_longrope_generates_past_its_first_table() -> None:
    """Where transformers computes all keys again, under the second table."""
    model = tiny.FAMILIES["phi3-longrope"]()
    model.config.original_max_position_embeddings = 64
    model.config.rope_parameters["original_max_position_embeddings"] = 64
    ids = torch.randint(2, 97, (1, 60), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    stock = model.generate(ids, **options)
    body = HFBody(model)
    assert body.window == 64
    cache = PagedCache(PagePool(body.shape, budget=MEMORY))
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), stock)
