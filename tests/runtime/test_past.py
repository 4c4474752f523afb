"""Chosen tokens before a sequence: against attention in float64, and against the full reading."""

from __future__ import annotations

import pytest
import torch
from grouped import HEADS, LAYERS, QUESTION, SIZE, body, engine, hidden, near, words
from tiny import FAMILIES
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.gather import Part, gather
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.pool import KVShape, PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.layer import Scoring, attend_past


def masks(tokens: int, seed: int = 0) -> Tensor:
    """Other tokens in every layer and head; one head has none, another all."""
    kept = torch.rand(LAYERS, HEADS, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    kept[0, 0], kept[1, 1] = False, True
    return kept


def after(context: Context, past: Past) -> Context:
    return Context.over(context.engine, past, context.ids)


def drawn(tokens: int, dtype: torch.dtype, group: int) -> tuple[BlockTable, Tensor, Tensor, Tensor]:
    """A table of random keys and values; k, v `[layers, Hkv, tokens, D]` and queries of two sequences."""
    chance = torch.Generator().manual_seed(tokens)
    shape = KVShape(LAYERS, HEADS, SIZE, dtype)
    table = BlockTable(PagePool(shape, budget=40 * shape.page_bytes))
    table.reserve(tokens)
    table.tokens = tokens
    k, v = (torch.randn(LAYERS, HEADS, tokens, SIZE, generator=chance).to(dtype) for _ in range(2))
    for number, page in enumerate(table.pages):
        at = slice(64 * number, 64 * number + 64)
        table.pool.write(page, k[:, :, at], v[:, :, at])
    return table, k, v, torch.randn(2, HEADS * group, 9, SIZE, generator=chance).to(dtype)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_attention_to_chosen_tokens_in_float64(group: int, dtype: torch.dtype, rows: int) -> None:
    table, k, v, queries = drawn(333, dtype, group)
    kept, q = masks(333), queries[:, :, :rows]
    past = gather([Part(Past.over(table), kept)], end=333)
    assert past.lens.tolist() == kept.sum(-1).tolist()
    for layer in range(LAYERS):
        found = attend_past(
            q, table.pool.tiles, past.tiles[layer], past.lens[layer], past.longest, Scoring(0.25)
        )
        for head in range(HEADS * group):
            of = head // group
            chosen = kept[layer, of]
            scores = 0.25 * q[:, head].double() @ k[layer, of, chosen].double().T
            close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
            want = scores.softmax(-1) @ v[layer, of, chosen].double()
            torch.testing.assert_close(found.out[:, head].double(), want, **close)
            torch.testing.assert_close(found.lse[:, head].double(), scores.logsumexp(-1), **close)


def tokens_of(x: Tensor) -> Tensor:
    """Rows of `[Hkv, N, D]` in an order of their own: that of a past does not matter."""
    return torch.stack([rows[rows[:, 0].argsort()] for rows in x[:, :330]])


@pytest.mark.parametrize("group", [1, 3, 4])
def test_everything_kept_is_the_full_reading(group: int) -> None:
    subject = engine(group)
    context = subject.read(words(500))
    full = torch.ones(500, dtype=torch.bool)
    makers = [
        lambda: Past.over(context.table),
        lambda: gather([Part(Past.over(context.table), full)], end=500),
        lambda: gather([Part(Past.over(context.table), full.expand(LAYERS, HEADS, -1))], end=500),
    ]
    for make in makers:
        for question in (QUESTION, words(150, 1)):  # a decode step and a longer one
            other = after(context, make())
            near(hidden(other, question), hidden(context.fork(), question))
            near(hidden(other, [3]), hidden(subject.read([*words(500), *question]), [3]))


def test_one_choice_for_all_heads_shares_whole_blocks() -> None:
    context = engine().read(words(640))
    pool, kept = context.engine.pool, torch.ones(640, dtype=torch.bool)
    kept[100:200] = False  # cuts blocks 1 and 3, removes 2
    used = pool.used_pages
    same = gather([Part(Past.over(context.table), kept)], end=640)
    assert pool.used_pages == used + 2  # 92 tokens of the cut blocks
    each = gather([Part(Past.over(context.table), kept.expand(LAYERS, HEADS, -1))], end=640)
    assert pool.used_pages == used + 2 + 9
    near(hidden(after(context, same), QUESTION), hidden(after(context, each), QUESTION))


def test_what_is_not_kept_has_no_effect() -> None:
    """Two texts that differ in one token, which is dropped together with all that saw it."""
    text, kept = words(300), torch.ones(300, dtype=torch.bool)
    kept[128:] = False
    contexts = [engine().read(text), engine().read([*text[:128], 90, *text[129:]])]
    found = [
        hidden(after(one, gather([Part(Past.over(one.table), kept)], end=300)), QUESTION) for one in contexts
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 5, 70)])
def test_rows_of_one_batch(lengths: tuple[int, ...]) -> None:
    """Rows that share a past, one with another and one with none: as each alone."""
    subject = engine()
    context = subject.read(words(400))
    past = gather([Part(Past.over(context.table), masks(400))], end=400)
    shared = after(context, past)
    other = after(context, gather([Part(Past.over(context.table), masks(400, 1))], end=400))
    empty = Context(subject, subject.read([]).state, [])
    rows = [shared.fork(), shared.fork(), other, empty]
    questions = [words(count, count) for count in (*lengths, 6)]
    alone = [hidden(row.fork(), question) for row, question in zip(rows, questions, strict=True)]
    width = max(map(len, questions))
    pads = [width - len(question) for question in questions]
    ids = torch.tensor([[0] * pad + question for pad, question in zip(pads, questions, strict=True)])
    near(subject.step(rows, ids, pads)[:, -1], torch.stack(alone))
    twins = [after(context, past.share()) for _ in range(3)]
    short = torch.tensor([question[:3] for question in questions[:3]])
    expected = [hidden(after(context, past.share()), row.tolist()) for row in short]
    near(subject.step(twins, short)[:, -1], torch.stack(expected))


def test_forks_share_and_closing_releases_everything() -> None:
    subject = engine()
    context = subject.read(words(400))
    source = Past.over(context.table)
    past = after(context, gather([Part(source, masks(400))], end=400))
    source.close()
    used = subject.pool.used_pages
    forks = [past.fork() for _ in range(10)]
    assert subject.pool.used_pages == used
    answers = [hidden(fork, [number, 2]) for number, fork in enumerate(forks)]
    assert subject.pool.used_pages == used + 10  # a page for what each was told
    forks.append(past.fork())
    near(answers[3], hidden(forks[-1], [3, 2]))
    past.state.select([0, 0])
    for one in (past, *forks, context):
        one.close()
        one.close()  # again is harmless
    subject.prefixes.clear()
    assert subject.pool.used_pages == 0


def test_two_readings_side_by_side_with_moved_keys() -> None:
    """In the first layer a key depends on its token and position alone, so it can be told."""
    subject, a, b = engine(), words(200, 1), words(130, 2)
    first, second = subject.read(a), subject.read(b)
    rotation = body(3).scoring.rotation
    assert rotation is not None
    at = torch.arange(130)
    parts = [
        Part(Past.over(first.table), torch.ones(200, dtype=torch.bool)),
        Part(Past.over(second.table), torch.ones(130, dtype=torch.bool), old=at, new=at + 200),
    ]
    past = gather(parts, end=330, turns=[rotation.move] * LAYERS)
    whole = Past.over(subject.read([*a, *b]).table)
    for one, other in zip(past.read(0), whole.read(0), strict=True):
        near(tokens_of(one), tokens_of(other))
    assert len(hidden(Context.over(subject, past, [*a, *b]), QUESTION)) == body(3).embedding.shape[1]
    with pytest.raises(ValueError, match="turns are needed"):
        gather(parts, end=330)


def test_crop_goes_back_to_the_chosen_tokens_and_no_further() -> None:
    context = engine().read(words(300))
    past = after(context, gather([Part(Past.over(context.table), masks(300))], end=300))
    straight = hidden(past.fork(), [1, 2, 3])
    past.feed([1, 2, 9, 9])
    past.crop(302)
    near(hidden(past, [3]), straight)
    with pytest.raises(ModelError, match="4 tokens are to be forgotten, 3 came after") as failed:
        past.crop(299)
    assert failed.value.code == "unsupported"


def test_a_choice_that_does_not_fit_the_memory_changes_nothing() -> None:
    shape = body(3).shape
    subject = Engine(body(3), fingerprint="tiny", memory_bytes=10 * shape.page_bytes)
    context = subject.read(words(500))
    kept = torch.ones(LAYERS, HEADS, 500, dtype=torch.bool)
    with pytest.raises(ModelError) as failed:
        gather([Part(Past.over(context.table), kept)], end=500)
    assert failed.value.code == "out_of_memory"
    with pytest.raises(ValueError, match="over 500 tokens is needed"):
        gather([Part(Past.over(context.table), kept[0, 0, :9])], end=500)


@pytest.mark.parametrize("text", ["streaming:window=100", "quest:guard=report", "lambda:window=90"])
def test_methods_that_need_the_whole_are_refused(text: str) -> None:
    context = engine(attention=text).read(words(300))
    name = text.partition(":")[0]
    with pytest.raises(ModelError, match=f"{name} does not go with chosen tokens") as failed:
        after(context, Past.over(context.table)).feed(QUESTION)
    assert failed.value.code == "unsupported"


def test_a_method_has_its_say_in_what_follows() -> None:
    """Quest reads the past whole, and of what came after it a part."""
    options = "budget=448,dense_below=448,dense_layers=0"
    found = []
    for text in ("dense", f"quest:{options}", f"quest:{options.replace('=448', '=4096')}"):
        context = engine(attention=text).read(words(300))
        past = after(context, Past.over(context.table))
        hidden(past, words(900, 1))
        found.append(hidden(past, QUESTION))
    near(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_other_families(family: str) -> None:
    found = HFBody(FAMILIES[family]())
    subject = Engine(found, fingerprint=family, memory_bytes=16 << 20)
    context = subject.read(words(300))
    other = after(context, Past.over(context.table))
    if family == "gemma2":
        with pytest.raises(ModelError, match="a layer with a window does not go"):
            other.feed(QUESTION)
        return
    near(hidden(other, QUESTION), hidden(context.fork(), QUESTION))
    near(hidden(other, [9]), hidden(subject.read([*words(300), *QUESTION]), [9]))
