"""Drafts never change an answer: ids are those of plain greedy decoding, whatever drafts them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.paths import Paths
from agentctx.runtime import twins
from agentctx.runtime.body import Body
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.llama import LlamaDecoder, supports
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.quest import Quest
from agentctx.runtime.methods.streaming import Streaming
from agentctx.runtime.methods.table import EVICTORS, method
from agentctx.runtime.sampling import Sampling, generate
from agentctx.runtime.speculate import FIRST, MOST, ROUNDS, Pace, Speculation, draft_method

NEVER = frozenset({-1})


class Always(Pace):
    """Drafts of every length in turn, whatever they cost."""

    def length(self) -> int:
        return 1 + self.rounds % MOST


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> LlamaDecoder:
    return LlamaDecoder.load(tiny_model, torch.float32)


@pytest.fixture(scope="module")
def other(tiny_model: Path) -> LlamaDecoder:
    """The same architecture with other weights: nearly all that it drafts is wrong."""
    body = LlamaDecoder.load(tiny_model, torch.float32)
    body.embedding = body.embedding.flip(0)
    return body


def engine_of(body: Body) -> Engine:
    return Engine(body, fingerprint="x", memory_bytes=1 << 28)


def plainly(engine: Engine, ids: list[int], most: int, ends: frozenset[int] = NEVER) -> list[int]:
    context, hidden = engine.begin(ids)
    found = generate(context, hidden, most=most, ends=ends, sampling=Sampling(), cancelled=threading.Event())
    try:
        return list(found)
    finally:
        context.close()


def drafted(
    engine: Engine, ids: list[int], most: int, how: Speculation, ends: frozenset[int] = NEVER
) -> list[int]:
    context, hidden = engine.begin(ids)
    found = list(how.generate(context, hidden, most=most, ends=ends, cancelled=threading.Event()))
    assert context.ids == [*ids, *found[:-1]]
    assert context.table.tokens == len(context.ids)
    context.close()
    return found


def prompt(tokens: int) -> list[int]:
    return torch.randint(3, 259, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def test_a_perfect_draft_is_accepted_whole(tiny: LlamaDecoder) -> None:
    how = Speculation(Dense(), pace=Always())
    assert drafted(engine_of(tiny), prompt(70), 200, how) == plainly(engine_of(tiny), prompt(70), 200)
    assert how.accepted_tokens == how.draft_tokens > 150


def test_a_sparse_draft_changes_nothing(tiny: LlamaDecoder) -> None:
    sparse = Quest(budget=448, dense_layers=0, dense_below=0)
    how = Speculation(sparse, pace=Always())
    assert drafted(engine_of(tiny), prompt(700), 200, how) == plainly(engine_of(tiny), prompt(700), 200)
    assert 0 < how.accepted_tokens <= how.draft_tokens


def test_a_wrong_draft_changes_nothing(tiny: LlamaDecoder, other: LlamaDecoder) -> None:
    how = Speculation(Dense(), other, pace=Always())
    assert drafted(engine_of(tiny), prompt(70), 200, how) == plainly(engine_of(tiny), prompt(70), 200)
    assert how.accepted_tokens < how.draft_tokens / 2


def test_twins_draft_for_the_weights_that_they_stand_for(tiny_model: Path) -> None:
    small = LlamaDecoder.load(tiny_model, torch.float32)
    twins.make(small.linears(), {})
    plain = small.plain()
    assert plain.head.twin is None and plain.layers[0].qkv.twin is None
    assert plain.head.weight is small.head.weight
    how = Speculation(Dense(), small, pace=Always())
    assert drafted(engine_of(plain), prompt(70), 200, how) == plainly(engine_of(plain), prompt(70), 200)
    assert how.accepted_tokens > 0


def test_nothing_is_kept_beyond_an_end_token_or_the_limit(tiny: LlamaDecoder) -> None:
    plain = plainly(engine_of(tiny), prompt(70), 60)
    for most in (1, 2, 3, 9):
        assert drafted(engine_of(tiny), prompt(70), most, Speculation(Dense(), pace=Always())) == plain[:most]
    end = next(token for at, token in enumerate(plain) if at > 20 and token not in plain[:at])
    upto = plain[: plain.index(end) + 1]
    how = Speculation(Dense(), pace=Always())
    assert drafted(engine_of(tiny), prompt(70), 60, how, frozenset({end})) == upto


def test_the_window_is_used_up_and_never_exceeded(tiny: LlamaDecoder) -> None:
    engine, how = engine_of(tiny), Speculation(Dense(), pace=Always())
    context, hidden = engine.begin(prompt(engine.body.window - 10))
    found: list[int] = []
    tokens = how.generate(context, hidden, most=50, ends=NEVER, cancelled=threading.Event())
    with pytest.raises(ModelError, match="window"):
        found.extend(tokens)
    assert len(found) == 11
    context.close()


def test_cancelling_ends_it(tiny: LlamaDecoder) -> None:
    engine, cancelled = engine_of(tiny), threading.Event()
    context, hidden = engine.begin(prompt(20))

    def until() -> Iterator[int]:
        how = Speculation(Dense(), pace=Always())
        for token in how.generate(context, hidden, most=100, ends=NEVER, cancelled=cancelled):
            cancelled.set()
            yield token

    assert len(list(until())) == 1
    context.close()


def test_drafts_are_as_long_as_they_pay() -> None:
    def pace(cheap: float, row: float, right: int) -> int:
        return Pace(plain=1.0, cheap=cheap, row=row, rounds=9, tried=10, right=right).length()

    assert Pace().length() == FIRST
    assert pace(0.1, 0.0, 10) == MOST
    assert pace(0.1, 0.0, 0) == 0
    assert pace(1.0, 0.1, 10) == 0
    assert 0 < pace(0.3, 0.1, 6) < pace(0.3, 0.1, 9)


# One of each kind of body and layer: ours, softcap with windows, sinks with windows, no rotation.
KINDS = [
    "llama",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("qwen3", "gemma2", "gpt-oss", "smollm3", "cohere")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tokens_are_those_of_greedy_decoding(kind: str) -> None:
    model = FAMILIES[kind]()
    config = model.config.to_dict()
    body: Body = HFBody(model)
    if supports(config):
        body = LlamaDecoder(config, model.state_dict(), torch.float32)
    assert isinstance(body, LlamaDecoder) == (kind in ("llama", "qwen3"))
    ids = [token % 90 + 2 for token in prompt(500)]
    how = Speculation(Quest(budget=448, dense_layers=0, dense_below=0), pace=Always())
    plain = plainly(engine_of(body), ids, 1000)
    assert drafted(engine_of(body), ids, 1000, how) == plain
    assert 0 < how.accepted_tokens <= how.draft_tokens
    if kind in ("llama", "qwen3"):  # the others come to repeat one token
        assert how.accepted_tokens < how.draft_tokens


def test_a_draft_that_does_not_pay_is_given_up(tiny: LlamaDecoder, other: LlamaDecoder) -> None:
    """The clock is scripted: a draft step takes half as long as an exact pass, and all drafts are wrong."""

    class Slow(Pace):
        def note(self, drafting: float, checking: float, length: int, right: int) -> None:
            super().note(0.5 * length, 1.0, length, right)

    how = Speculation(Dense(), other, pace=Slow())
    assert drafted(engine_of(tiny), prompt(70), 200, how) == plainly(engine_of(tiny), prompt(70), 200)
    assert how.pace.rounds == ROUNDS and how.draft_tokens == ROUNDS * FIRST


def test_what_drafts() -> None:
    assert draft_method(Dense()) == Quest()
    assert draft_method(Quest(budget=512, guard="report")) == Quest(budget=512)
    for changed in (Streaming(), *map(method, EVICTORS)):  # what is left of a text is not what it said
        with pytest.raises(ConfigError, match=changed.name):
            draft_method(changed)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_says_the_same(embedded: Paths) -> None:
    body = LlamaDecoder.load(embedded.models / "smollm2/safetensors", torch.float32)
    ids = torch.randint(100, 40000, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    how = Speculation(Quest(budget=448, dense_below=0), pace=Always())
    assert drafted(engine_of(body), ids, 200, how) == plainly(engine_of(body), ids, 200)
    assert how.accepted_tokens > 0
