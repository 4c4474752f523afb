"""The contracts of every attention method, on a small decoder with random weights in float32.

Kept keys and values are compared up to rounding where another cut changes the order of sums: matrix products
depend on the number of their rows in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.store import BlockStore
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import ANCHORS, METHODS, method

SMALL = {  # sparse from a few hundred tokens on
    "dense": "dense",
    "quest": "quest:budget=448,dense_below=448,dense_layers=1",
    "mean": "mean:budget=448,dense_below=448,dense_layers=1",
    "adamas": "adamas:budget=448,dense_below=448,dense_layers=1",
    "streaming": "streaming:window=252",
    "lambda": "lambda:window=250",
    "ladder": "ladder:budget=256,recent=64,width=2",
    "selfextend": "selfextend:window=200,group=4",
    "ropescale": "ropescale:kind=yarn,factor=2",
    "triangle": "triangle:dense_below=200,local=128",
    "blocktopk": "blocktopk:budget=256,dense_below=200,dense_layers=1",
    "flex": "flex:budget=192,dense_below=200,dense_layers=1,cell=256,gamma=0.4",
    "random": "random:budget=448,dense_below=448,dense_layers=1",
}
FULL = {
    **dict.fromkeys(SMALL, ":budget=4096"),
    "dense": "",
    "streaming": ":window=4000",
    "lambda": ":window=4000",
    "selfextend": ":window=1000,group=1",
    "ropescale": ":factor=1",
    "triangle": ":local=4000",
}
SPARSE = [name for name in SMALL if name != "dense"]
BLOCKWISE = [name for name in SPARSE if hasattr(method(name), "dense_layers")]
MOVING = ("streaming", "lambda", "ladder", "selfextend", "ropescale")
READING = (*MOVING, "triangle", "blocktopk", "flex")  # methods that change what is stored
CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 128,
    "vocab_size": 97,
    "model_type": "llama",
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
}
VOCABULARY = 97
QUESTION = list(range(20, 32))


@cache
def body() -> LlamaDecoder:
    """Weights large enough for attention that prefers some keys."""
    chance = torch.Generator().manual_seed(5)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=chance) * scale / shape[-1] ** 0.5

    tensors = {
        "model.embed_tokens.weight": drawn(VOCABULARY, 128, scale=8.0),
        "model.norm.weight": torch.ones(128),
        "lm_head.weight": drawn(VOCABULARY, 128),
    }
    shapes = {
        "self_attn.q_proj": (128, 128, 2.0),
        "self_attn.k_proj": (64, 128, 2.0),
        "self_attn.v_proj": (64, 128, 1.0),
        "self_attn.o_proj": (128, 128, 1.0),
        "mlp.gate_proj": (128, 128, 1.0),
        "mlp.up_proj": (128, 128, 1.0),
        "mlp.down_proj": (128, 128, 1.0),
    }
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, scale) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = drawn(rows, columns, scale=scale)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(128)
    return LlamaDecoder(CONFIG, tensors, torch.float32)


def engine(text: str, *, chunk: int = 512, store: BlockStore | None = None) -> Engine:
    return Engine(
        body(), fingerprint="small", memory_bytes=64 << 20, method=method(text), chunk=chunk, store=store
    )


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def stored(context: Context) -> Tensor:
    """K and V of all layers, `[2, layers, Hkv, tokens, D]`."""
    table = context.table
    pages = [torch.stack(table.pool.read(page, 64)) for page in table.pages]
    return torch.cat(pages, 3)[..., : table.tokens, :]


def answer(context: Context, question: Sequence[int] = QUESTION, count: int = 6) -> tuple[list[int], Tensor]:
    """Greedy ids after a question, and the logits of the last step."""
    ids: list[int] = []
    hidden = context.feed(question)
    for _ in range(count):
        assert hidden is not None
        logits = context.engine.logits(hidden)
        ids.append(int(logits.argmax()))
        hidden = context.feed(ids[-1:])
    return ids, logits


def same(a: tuple[list[int], Tensor], b: tuple[list[int], Tensor]) -> None:
    assert a[0] == b[0]
    torch.testing.assert_close(a[1], b[1], atol=2e-4, rtol=1e-4)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_the_table_is_complete() -> None:
    assert {*METHODS, *ANCHORS} == set(SMALL)
    for name in SMALL:
        assert method(name).name == name
        assert bool(method(name).writes) == (name in READING)


@pytest.mark.parametrize("name", SPARSE)
def test_a_budget_for_everything_is_dense(name: str) -> None:
    text = words(1100)
    same(answer(engine(name + FULL[name]).read(text)), answer(engine("dense").read(text)))


@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_list_of_all_blocks_is_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the sparse kernels, which a budget above the length never reaches."""
    some, text = engine(name + FULL[name] + ",dense_layers=1"), words(1100)
    monkeypatch.setattr(type(some.method), "limit", property(lambda method: 512))
    same(answer(some.read(text)), answer(engine("dense").read(text)))


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_is_not_dense(name: str) -> None:
    """Else the other tests would show nothing."""
    text = words(1100)
    sparse, dense = answer(engine(SMALL[name]).read(text)), answer(engine("dense").read(text))
    assert not torch.allclose(sparse[1], dense[1], atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_pieces_do_not_matter(name: str) -> None:
    text = words(1100)
    first = engine(SMALL[name]).read(text)
    expected = answer(first.fork())
    for chunk in (128, 200, 2048):
        other = engine(SMALL[name], chunk=chunk).read(text)
        near(stored(other), stored(first))
        same(answer(other), expected)


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_rows(name: str) -> None:
    texts = [words(count, count) for count in (500, 430, 505, 90)]
    together = engine(SMALL[name])
    held = together.read_all(texts)
    asked = torch.tensor([QUESTION] * len(texts))
    hidden = together.step([context.fork() for context in held], asked)
    for index, text in enumerate(texts):
        alone = engine(SMALL[name]).read(text)
        near(stored(held[index]), stored(alone))
        near(hidden[index, -1], alone.feed(QUESTION))
    again = together.step(held, asked[:, :1])
    near(again, torch.stack([engine(SMALL[name]).read(text).feed(QUESTION[:1])[None] for text in texts]))


@pytest.mark.parametrize("name", SMALL)
def test_forks_are_separate_runs(name: str) -> None:
    text = words(900)
    parent = engine(SMALL[name]).read(text)
    before = stored(parent)
    found = [answer(parent.fork(), words(9 + seed, seed)) for seed in (1, 2)]
    assert torch.equal(stored(parent), before)
    for seed, one in zip((1, 2), found, strict=True):
        same(answer(engine(SMALL[name]).read(text), words(9 + seed, seed)), one)


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    text = words(730)

    def opened() -> Context:
        store = BlockStore(tmp_path, "small", budget=1 << 28)
        return engine(SMALL[name], store=store).read(text, keep=True)

    first, second = opened(), opened()
    assert (first.computed, second.computed) == (730, 0)
    assert torch.equal(stored(first), stored(second))
    assert answer(first)[0] == answer(second)[0]


@pytest.mark.parametrize("name", SMALL)
def test_texts_that_begin_alike_do_not_mix(name: str) -> None:
    """What a text reuses of a longer or a shorter one is what it would have computed."""
    text, some = words(1100), engine(SMALL[name])
    some.read(text[:650])
    for length in (1100, 700, 650):
        shared = some.read(text[:length])
        alone = engine(SMALL[name]).read(text[:length])
        assert shared.reused >= 512
        near(stored(shared), stored(alone))
        same(answer(shared), answer(alone))


@pytest.mark.parametrize("name", SMALL)
def test_crop_and_feed_again(name: str) -> None:
    context = engine(SMALL[name]).read(words(900))
    question = words(70, 3)
    straight = answer(context.fork(), question)
    context.feed(question)
    context.feed(words(30, 4))
    context.crop(900 + 63)
    same(answer(context, question[63:]), straight)


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "ropescale"])
def test_short_texts_are_dense(name: str) -> None:
    text = words(180)
    sparse, dense = engine(SMALL[name]).read(text), engine("dense").read(text)
    assert torch.equal(stored(sparse), stored(dense))
    assert answer(sparse)[0] == answer(dense)[0]


@pytest.mark.parametrize("name", [name for name in SPARSE if name not in READING])
def test_methods_that_only_ask_store_what_dense_stores(name: str) -> None:
    text, dense, sparse = words(1100), engine("dense"), engine(SMALL[name])
    assert sparse.root == dense.root and sparse.identity != dense.identity
    assert torch.equal(stored(sparse.read(text)), stored(dense.read(text)))
    begun = sparse.begin(words(1100, 1))[0]
    assert torch.equal(stored(begun), stored(dense.begin(words(1100, 1))[0]))


@pytest.mark.parametrize("name", READING)
def test_methods_that_write_have_readings_of_their_own(name: str) -> None:
    some = engine(SMALL[name])
    assert len({some.root, engine("dense").root, engine(name + FULL[name]).root}) == 3
    prompt = words(1100)
    fresh = some.begin(prompt)
    again = some.begin(prompt)
    assert fresh[1] is not None and again[1] is not None
    near(again[1], fresh[1])
    assert again[0].computed < 600


class Wide(TorchDispatchMode):
    """Collects the shapes of results that grow with rows times keys."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and sum(size >= 1000 for size in tensor.shape) > 1:
                self.found.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("name", SMALL)
def test_nothing_has_the_size_of_rows_times_keys(name: str) -> None:
    some = engine(SMALL[name], chunk=2048)
    with Wide() as wide:
        context = some.read(words(1100))
        context.feed(words(900, 2))
    assert not wide.found


@pytest.mark.parametrize("name", MOVING)
def test_texts_beyond_the_window(name: str) -> None:
    text = words(2500)
    with pytest.raises(ModelError, match="2,500 tokens exceed"):
        engine("dense").read(text)
    assert len(answer(engine(SMALL[name]).read(text))[0]) == 6


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("selfextend:window=200,group=4", 4 * (2048 - 200 + 50)),
        ("selfextend:window=200,tokens=8000", 10 * (2048 - 200 + 20)),  # the least g with 7800 / g <= 824
        ("ropescale:factor=3", 3 * 2048),
        ("ropescale:factor=3+quest", 3 * 2048),
        ("ropescale:factor=2+selfextend:window=200,group=4", 4 * (4096 - 200 + 50)),
    ],
)
def test_how_far_the_window_reaches(text: str, window: int) -> None:
    some = engine(text)
    assert some.window == window
    some.fits(window)
    with pytest.raises(ModelError, match="exceed the model's window"):
        some.fits(window + 1)


def test_scaling_and_a_sparse_method_at_once() -> None:
    """The questions are sparse, the reading is that of the scaling alone."""
    text, sparse = words(2500), f"ropescale:factor=2+{SMALL['quest']}"
    both, scaled = engine(sparse), engine("ropescale:factor=2")
    assert both.root == scaled.root and both.identity != scaled.identity
    assert torch.equal(stored(both.read(text)), stored(scaled.read(text)))
    full = engine("ropescale:factor=2+quest:budget=4096").read(text)
    same(answer(full), answer(scaled.read(text)))
    assert not torch.allclose(answer(both.read(text))[1], answer(full)[1], atol=1e-3)


def test_a_rotation_that_is_not_known() -> None:
    some = engine("streaming:window=100")
    plain = some.body.scoring  # type: ignore[attr-defined]
    try:
        some.body.scoring = replace(plain, rotation=None)  # type: ignore[attr-defined]
        with pytest.raises(ModelError, match="rotation of positions") as failed:
            some.read(words(200))
    finally:
        some.body.scoring = plain  # type: ignore[attr-defined]
    assert failed.value.code == "unsupported"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparse", "no attention method 'sparse'"),
        ("quest:speed=3", "no parameter 'speed'"),
        ("quest:budget=much", "budget is 'much'"),
        ("quest:budget=64", "too small"),
        ("quest:sink_blocks=-1", "below 0"),
        ("quest:guard=always", "guard is 'always'"),
        ("quest:guard=certified:2", "guard is"),
        ("streaming:sinks=0", "sinks is 0"),
        ("ladder:budget=300", "too small"),
        ("ladder:span=2,overlap=2", "overlap is 2"),
        ("selfextend:window=0", "out of range"),
        ("ropescale:kind=dynamic", "no rope scaling 'dynamic'"),
        ("ropescale:factor=0.5", "factor is 0.5"),
        ("ropescale:inner=quest", "no parameter 'inner'"),
        ("ropescale+sparse", "no attention method 'sparse'"),
        ("quest+mean", "cannot be combined"),
        ("triangle:start=2", "out of range"),
        ("blocktopk:budget=64", "too small"),
        ("flex:cell=100", "cell is 100"),
        ("flex:gamma=0", "gamma is 0"),
    ],
)
def test_what_cannot_be_asked_for(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ladder:span=3,overlap=2", "drops nothing in some of 4 layers"),
        ("ladder:width=500", "drops nothing"),
        ("selfextend:window=1024", "no room in the model's 2048"),
    ],
)
def test_what_does_not_suit_a_model(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine(text)
