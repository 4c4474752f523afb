"""The contracts of every evictor, on small decoders with random weights in float32."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from grouped import HEADS, LAYERS, QUESTION, body, engine, hidden, near, words
from tiny import FAMILIES
from torch import Tensor

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.choices import Choices
from agentctx.memory.kv.store import BlockStore
from agentctx.models.load import open_model
from agentctx.models.local import LocalChat
from agentctx.paths import Paths
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.methods.evictor import Evictor, compress
from agentctx.runtime.methods.kvzip import KVZip
from agentctx.runtime.methods.table import EVICTING_ANCHORS, EVICTORS, method

NAMES = [*EVICTORS, *EVICTING_ANCHORS]


def evictor(name: str, options: str = "") -> Evictor:
    found = method(f"{name}:dense_below=100{options}")
    assert isinstance(found, Evictor) and found.name == name
    return found


def through(name: str, keep: float = 0.5) -> str:
    """As an attention method."""
    return f"{name}:keep={keep},dense_below=100"


def answer(context: Context, question: Sequence[int] = QUESTION, count: int = 6) -> list[int]:
    """Greedy ids after a question, asked in a fork."""
    fork = context.fork()
    last, ids = hidden(fork, question), []
    for _ in range(count):
        ids.append(int(context.engine.logits(last).argmax()))
        last = hidden(fork, ids[-1:])
    fork.close()
    return ids


def lengths(context: Context) -> Tensor:
    """Tokens that each head holds, `[layers, Hkv]`."""
    past = context.state.pasts[0]
    assert past is not None
    return past.lens


@pytest.mark.parametrize("group", [1, 3, 4])
def test_keeping_everything_is_dense(group: int) -> None:
    context = engine(group).read(words(200))
    expected, last = answer(context), hidden(context.fork(), QUESTION)
    for name in NAMES:
        whole = compress(context, evictor(name), keep=1.0)
        assert bool((lengths(whole) == 200).all())
        near(hidden(whole.fork(), QUESTION), last)
        assert answer(whole) == expected


@pytest.mark.parametrize("name", NAMES)
def test_keeping_a_part_is_not_dense_and_as_large_as_it_says(name: str) -> None:
    """At half, at most 0.55 of the dense bytes are held."""
    context = engine().read(words(1280))
    pool, dense = context.engine.pool, context.engine.pool.used_bytes
    part = compress(context, evictor(name), keep=0.5)
    assert abs(int(lengths(part).sum()) - 640 * LAYERS * HEADS) <= LAYERS * HEADS
    full = hidden(context, QUESTION)
    context.close()
    context.engine.prefixes.clear()
    assert pool.used_bytes <= 0.55 * dense
    assert not torch.allclose(hidden(part, QUESTION), full, atol=1e-3)
    part.close()
    assert pool.used_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_as_an_attention_method(name: str) -> None:
    """Reading evicts; the full blocks stay what they are for every other method."""
    text, some, dense = words(300), engine(attention=through(name)), engine()
    found = some.read(text)
    assert (found.computed, found.reused, found.ids) == (300, 0, text)
    assert some.root == dense.root and some.identity != dense.identity
    same = compress(dense.read(text), evictor(name), keep=0.5)
    assert torch.equal(lengths(found), lengths(same)) and answer(found) == answer(same)
    again = some.read(text)
    assert (again.computed, again.reused) == (0, 300) and answer(again) == answer(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_read_evicted_and_asked(name: str) -> None:
    """The last 128 tokens and what is beside the grid ask: they see what is left, and stay whole."""
    prompt, some = words(400), engine(attention=through(name))
    context, last = some.begin(prompt)
    read = some.read(prompt[:256])
    assert context.table.tokens == 144 and torch.equal(lengths(context), lengths(read))
    assert last is not None
    near(last, hidden(read, prompt[256:]))
    again, second = some.begin(prompt)
    assert second is not None and (again.reused, again.computed) == (256, 144)
    near(second, last)
    assert context.computed + context.reused == len(context.ids) == 400


@pytest.mark.parametrize("name", NAMES)
def test_pieces_do_not_matter(name: str) -> None:
    first = engine(attention=through(name)).read(words(300))
    for chunk in (64, 128):
        other = engine(attention=through(name), chunk=chunk).read(words(300))
        assert torch.equal(lengths(other), lengths(first))
        near(hidden(other.fork(), QUESTION), hidden(first.fork(), QUESTION))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_rows(name: str) -> None:
    texts = [words(count, count) for count in (300, 230, 90)]  # the last one stays whole
    together = engine(attention=through(name))
    held = together.read_all(texts)
    found = together.step([context.fork() for context in held], torch.tensor([QUESTION] * 3))
    for row, text in zip(found, texts, strict=True):
        near(row[-1], hidden(engine(attention=through(name)).read(text), QUESTION))


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_and_evicted_again(name: str, tmp_path: Path) -> None:
    """The blocks come from the disk, the choice is made again: bit for bit the same."""

    def opened() -> Context:
        store = BlockStore(tmp_path, "tiny", budget=1 << 28)
        return engine(attention=through(name), store=store).read(words(250), keep=True)

    first, second = opened(), opened()
    assert (first.computed, second.computed, second.reused) == (250, 0, 250)
    pasts = [context.state.pasts[0] for context in (first, second)]
    assert pasts[0] is not None and pasts[1] is not None
    for layer in range(LAYERS):
        for one, other in zip(pasts[0].read(layer), pasts[1].read(layer), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(hidden(first.fork(), QUESTION), hidden(second.fork(), QUESTION))
    assert answer(first) == answer(second)


@pytest.mark.parametrize("name", NAMES)
def test_forks_crop_and_other_questions_change_nothing(name: str) -> None:
    context = engine().read(words(250))
    part = compress(context, evictor(name), keep=0.3)
    straight = answer(part)
    for seed in (1, 2):
        hidden(part.fork(), words(70, seed))
        hidden(context.fork(), words(70, seed))
    fork = part.fork()
    hidden(fork, [*QUESTION, *words(90, 3)])
    fork.crop(250 + 2)
    assert answer(fork, QUESTION[2:]) == straight == answer(part)
    later = compress(context, evictor(name), keep=0.3)
    assert torch.equal(lengths(later), lengths(part)) and answer(later) == straight


def test_short_texts_stay_whole() -> None:
    expected = answer(engine().read(words(200)))
    for name in NAMES:
        found = engine(attention=f"{name}:keep=0.1").read(words(200))
        assert found.state.pasts == [None] and answer(found) == expected


def test_a_tiny_share_and_a_tiny_text() -> None:
    context, short = engine(4).read(words(300)), engine(4).read([7])
    for name in NAMES:
        least = compress(context, evictor(name, ",keep=0.001"))
        assert int(lengths(least).sum()) < LAYERS * HEADS * 300
        assert len(answer(least, count=1)) == 1
        assert len(answer(compress(short, evictor(name), keep=0.5), count=1)) == 1


def test_a_family_with_layers_that_do_not_rotate() -> None:
    subject = Engine(HFBody(FAMILIES["smollm3"]()), fingerprint="other", memory_bytes=16 << 20)
    context = subject.read(words(200))
    for name in NAMES:
        whole = compress(context, evictor(name), keep=1.0)
        near(hidden(whole, QUESTION), hidden(context.fork(), QUESTION))
        assert len(answer(compress(context, evictor(name), keep=0.4), count=1)) == 1


def test_windows_are_refused_before_anything_is_lost() -> None:
    subject = Engine(HFBody(FAMILIES["qwen2-window"]()), fingerprint="other", memory_bytes=16 << 20)
    context = subject.read(words(150))
    used = subject.pool.used_pages
    for name in NAMES:
        with pytest.raises(ModelError, match="layers with a window") as failed:
            compress(context, evictor(name))
        assert failed.value.code == "unsupported" and subject.pool.used_pages == used


@pytest.mark.parametrize(
    "text",
    ["snap:keep=0", "snap:keep=1.1", "snap:pool=4", "snap:slope=2", "kvzip:chunk=9", "expected:ahead=0"]
    + ["lagkv:lag=1", "keydiff:dense_below=-1", "expected:rows=10"],
)
def test_parameters_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError):
        method(text)


def test_what_cannot_be_compressed() -> None:
    subject = engine()
    context = subject.read(words(300))
    part = compress(context, evictor("keydiff"), keep=0.5)
    for given, message in ((part, "chosen tokens already"), (subject.read([]), "empty reading")):
        with pytest.raises((ModelError, ConfigError), match=message):
            compress(given, evictor("keydiff"))
    long = subject.read(words(2000))
    with pytest.raises(ModelError, match="leave no room") as failed:
        compress(long, evictor("kvzip"))
    assert failed.value.code == "overflow"


def test_no_room_for_what_is_kept_leaks_nothing() -> None:
    shape = body(3).shape
    subject = Engine(body(3), fingerprint="tiny", memory_bytes=10 * shape.page_bytes)
    context = subject.read(words(500))
    for name in NAMES:
        with pytest.raises(ModelError) as failed:
            compress(context, evictor(name), keep=0.9)
        assert failed.value.code == "out_of_memory" and subject.pool.used_pages == 8


def test_a_cancelled_read_is_not_evicted() -> None:
    cancelled = threading.Event()
    some = engine(attention=through("snap"))
    part = some.read(words(900), cancelled=cancelled, progress=lambda *_: cancelled.set())
    assert part.ids == words(900)[:512] and part.state.pasts == [None]
    whole = some.read(words(900))
    assert (whole.reused, whole.computed) == (512, 388) and whole.state.pasts != [None]


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine lives; another share or another text is another choice."""
    subject = engine()
    context = subject.read(words(300))
    expected = answer(compress(context, evictor("kvzip"), keep=0.4))
    with monkeypatch.context() as patch:
        patch.setattr(KVZip, "scores", lambda *_: pytest.fail("chosen again"))
        assert answer(compress(subject.read(words(300)), evictor("kvzip"), keep=0.4)) == expected
        for given, keep in ((context, 0.3), (subject.read(words(299)), 0.4)):
            with pytest.raises(pytest.fail.Exception, match="chosen again"):
                compress(given, evictor("kvzip"), keep=keep)


def test_choices_stay_within_their_budget() -> None:
    chance = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, 3, 35, generator=chance) < 0.5 for _ in range(5)]
    held = Choices(budget=3 * 27)
    for number, mask in enumerate(masks):
        held.put(str(number), mask)
        assert held.used_bytes <= held.budget
        held.get("0")
    assert [held.get(str(number)) is not None for number in range(5)] == [True, False, False, True, True]
    found = held.get("4")
    assert found is not None and torch.equal(found, masks[4])
    held.put("large", torch.ones(10_000, dtype=torch.bool))
    assert held.get("large") is None and held.get("4") is not None


def test_a_chat_model_with_an_evictor(tiny_model: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "cache", tmp_path / "data", tmp_path / "state", tmp_path / "config")
    said = {}
    for attention in ("dense", "snap:keep=1.0", "snap:keep=0.3,dense_below=50"):
        model = open_model(str(tiny_model), paths=paths, offline=True, attention=attention)
        assert isinstance(model.chat, LocalChat)
        reply = model.chat.invoke("The court ruled on 3 May. " * 20, max_tokens=12)
        usage = reply.usage_metadata
        assert usage is not None and usage["input_tokens"] > 500
        said[attention] = reply.text
    assert said["dense"] == said["snap:keep=1.0"]


def test_only_snap_depends_on_the_end() -> None:
    assert [name for name in NAMES if evictor(name).query_aware] == ["snap"]
