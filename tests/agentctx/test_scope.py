"""Scopes of a branch on a small model of random weights: dropped, kept, restored, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.memory.blobs import Blobs
from agentctx.memory.errors import ConfigError, ModelError, StoreError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.models.weights import Weights
from agentctx.reading.branch import Branch
from agentctx.reading.engine import Engine
from agentctx.reading.reading import Reading
from agentctx.runtime.engine import Engine as Runtime
from tests.agentctx.tiny_reader import TEXT, engine

THOUGHT = "First I look at the harbour; then at the court, and at 1984. " * 3
RESULT = "The court ruled."
AFTER = " What follows from it?"
MOST = 12


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Engine:
    return engine(tiny_model)


@pytest.fixture
def reading(subject: Engine) -> Iterator[Reading]:
    with subject.read(TEXT) as found:
        yield found


def answer(branch: Branch, prompt: str = "So?") -> tuple[int, ...]:
    with branch.fork() as fork:
        return fork.generate(prompt, max_new_tokens=MOST).token_ids


def said(reading: Reading, *texts: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids and the next answer of a branch that was told these texts and nothing else."""
    with reading.fork() as branch:
        for text in texts:
            branch.feed(text)
        return branch.token_ids, answer(branch)


def test_a_closed_scope_is_as_if_only_its_conclusion_had_been_read(reading: Reading) -> None:
    with reading.fork() as branch:
        branch.feed("Begin. ")
        with branch.scope("node-17") as scope:
            branch.feed(THOUGHT)
            branch.generate(max_new_tokens=9)
        before, thought = answer(branch), branch.token_ids
        branch.feed(AFTER)
        assert answer(branch) != before
        scope.close(RESULT)
        assert (branch.token_ids, answer(branch)) == said(reading, "Begin. ", RESULT, AFTER)
        assert scope.token_ids == tuple(branch.engine.tokens.data(RESULT).ids)
        scope.restore()
        assert branch.token_ids == (*thought, *branch.engine.tokens.data(AFTER).ids)
        assert scope.token_ids == thought[scope.start : scope.end]


def test_what_is_restored_answers_as_before(reading: Reading) -> None:
    with reading.fork() as branch:
        with branch.scope("a") as scope:
            branch.feed(THOUGHT)
            branch.generate("Hm.", max_new_tokens=7, temperature=1.5, seed=3)
        ids, reply = branch.token_ids, answer(branch)
        for mode in ("reread", "keep"):
            scope.close("court" if mode == "keep" else RESULT, mode=mode)
            assert answer(branch) != reply
            scope.restore()
            assert (branch.token_ids, answer(branch)) == (ids, reply)


@pytest.mark.parametrize("mode", ["reread", "keep"])
def test_pages_go_back_to_the_pool(
    subject: Engine, reading: Reading, mode: Literal["reread", "keep"]
) -> None:
    pool = subject.runtime.pool
    with reading.fork() as branch:
        branch.feed("x")
        before = pool.used_pages
        with branch.scope("long") as scope:
            branch.feed(f"{'Let me think of it. ' * 40}{RESULT}")
        held = pool.used_pages
        assert held >= before + 12
        scope.close(RESULT, mode=mode)
        assert before <= pool.used_pages <= before + 1
        assert pool.used_bytes == pool.used_pages * pool.shape.page_bytes
        scope.restore()
        assert pool.used_pages == held
    with reading.fork() as branch:
        branch.feed("x")
        assert pool.used_pages == before


def test_a_kept_conclusion_moves_forward_as_it_is(subject: Engine, reading: Reading) -> None:
    """Its values and those of what came after are bit for bit what they were; its keys are turned."""
    with reading.fork() as branch:
        with branch.scope("a") as scope:
            branch.feed(f"{THOUGHT}{RESULT} And so on.")
        branch.feed(AFTER)
        context = branch._held()
        ids = list(branch.token_ids)
        tail = len(subject.tokens.data(AFTER).ids)
        start = scope.start + len(subject.tokens.data(THOUGHT).ids)
        stay = [*range(start, start + len(RESULT)), *range(len(ids) - tail, len(ids))]
        k, v = context.table.read(0)
        scope.close(RESULT, mode="keep")
        context = branch._held()
        assert branch.token_ids == (*ids[: scope.start], *(ids[at] for at in stay))
        assert scope.token_ids == tuple(subject.tokens.data(RESULT).ids)
        keys, values = context.table.read(0)
        assert torch.equal(values[:, :, scope.start :], v[:, :, stay])
        assert torch.equal(values[:, :, : scope.start], v[:, :, : scope.start])
        old, new = torch.tensor(stay), torch.arange(scope.start, len(branch.token_ids))
        for layer, rotation in enumerate(subject.runtime.body.rotations()):
            assert rotation is not None
            turned = rotation.move(k[layer][None][:, :, stay], old, new)[0]
            torch.testing.assert_close(keys[layer, :, scope.start :], turned, rtol=0, atol=1e-5)
        computed = context.computed
        first = answer(branch)
        assert first == answer(branch) and context.computed == computed == 0


def test_scopes_in_a_row_and_in_one_another(reading: Reading) -> None:
    with reading.fork() as branch:
        with branch.scope("outer") as outer:
            branch.feed("One. ")
            with branch.scope("first") as first:
                branch.feed(THOUGHT)
            branch.feed("Two. ")
            with branch.scope("second") as second:
                branch.feed("A second thought. ")
                second.close("2. ")
        with branch.scope("last") as last:
            branch.feed("The end. ")
        first.close("1. ")
        assert branch.token_ids == said(reading, "One. ", "1. ", "Two. ", "2. ", "The end. ")[0]
        second.restore()
        last.close("E. ")
        told = ("One. ", "1. ", "Two. ", "A second thought. ", "E. ")
        assert (branch.token_ids, answer(branch)) == said(reading, *told)
        outer.close("O. ")
        assert (branch.token_ids, answer(branch)) == said(reading, "O. ", "E. ")
        with pytest.raises(ConfigError, match="lay in another"):
            first.restore()
        last.restore()
        outer.restore()
        assert branch.token_ids == said(reading, *told[:-1], "The end. ")[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    close=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "x", "done. "])), max_size=6),
    mode=st.sampled_from(["reread", "keep"]),
)
def test_any_order_of_closing_and_restoring(
    tiny_model: Path, sizes: list[int], close: list[tuple[int, str]], mode: Literal["reread", "keep"]
) -> None:
    subject = engine(tiny_model)
    with subject.read("Base.") as reading, reading.fork() as branch:
        whole = [f"{'n' * size}done. x" for size in sizes]
        scopes = []
        for text in whole:
            with branch.scope(text[:1]) as scope:
                branch.feed(text)
            scopes.append(scope)
        now = list(whole)
        for at, keep in close:
            at %= len(scopes)
            if scopes[at].archived:
                scopes[at].restore()
                now[at] = whole[at]
            else:
                scopes[at].close(keep, mode=mode)
                now[at] = keep
        assert branch.token_ids == said(reading, *now)[0]
        pages = -(-len(branch.token_ids) // PAGE_TOKENS)
        assert len(branch._held().table.pages) == pages


@pytest.mark.parametrize("mode", ["reread", "keep"])
def test_memory_of_eight_bits_gives_its_pages_back_too(
    tiny_model: Path, mode: Literal["reread", "keep"]
) -> None:
    plain = engine(tiny_model).weights
    body = plain.engine.body
    runtime = Runtime(body, fingerprint="t", memory_bytes=400 * body.shape.page_bytes, kv_dtype="int8")
    subject = Engine(Weights(runtime, plain.tokenizer, "tiny", plain.ends))
    with subject.read(TEXT) as reading, reading.fork() as branch:
        branch.feed("x")
        before = runtime.pool.used_pages
        with branch.scope("long") as scope:
            branch.feed(f"{'Let me think of it. ' * 40}{RESULT}")
        held, ids = runtime.pool.used_pages, branch.token_ids
        branch.feed(AFTER)
        scope.close(RESULT, mode=mode)
        assert before <= runtime.pool.used_pages <= before + 2 < held
        assert list(scope.token_ids) == subject.tokens.data(RESULT).ids
        assert len(answer(branch)) == MOST
        scope.restore()
        assert branch.token_ids[: len(ids)] == ids and len(answer(branch)) == MOST


def test_what_is_dropped_is_archived_by_its_hash(tiny_model: Path, tmp_path: Path) -> None:
    plain = engine(tiny_model)
    kept = Engine(plain.weights, secret=b"s" * 32, archive=Blobs(tmp_path))
    with kept.read(TEXT) as reading, reading.fork() as branch:
        with branch.scope("a") as scope:
            branch.feed(THOUGHT)
        ids = scope.token_ids
        id = scope.close(RESULT)
        assert scope.archived == id
        found = json.loads(Blobs(tmp_path).get(id))
        assert (found["text"], tuple(found["token_ids"])) == (THOUGHT, ids)
        (path,) = tmp_path.rglob("*.txt")
        path.write_text(path.read_text().replace("harbour", "market"))
        told = branch.token_ids
        with pytest.raises(StoreError, match="damaged"):
            scope.restore()
        assert branch.token_ids == told and scope.archived == id


def test_what_cannot_be_done_changes_nothing(subject: Engine, reading: Reading) -> None:
    with reading.fork() as branch:
        with branch.scope("a") as scope:
            branch.feed(THOUGHT)
        ids = branch.token_ids
        with pytest.raises(ConfigError, match="does not stand in the scope"):
            scope.close("never said", mode="keep")
        with pytest.raises(ConfigError, match="no mode 'drop'"):
            scope.close("", mode="drop")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="nothing was dropped"):
            scope.restore()
        with pytest.raises(ModelError) as failed:
            scope.close("x" * 4000)
        assert failed.value.code == "overflow" and branch.token_ids == ids and scope.archived is None
        scope.close("ok")
        with pytest.raises(ConfigError, match="'a' is closed"):
            scope.close("again")
        with branch.scope("b") as late:
            branch.feed("More.")
        branch.drop([(0, 20)])
        with pytest.raises(ModelError, match="go back to the full reading|came after the chosen"):
            late.close("")
        assert late.archived is None
        branch.feed("It goes on.")


def test_32_forks_cost_the_base_and_two_pages_each(subject: Engine) -> None:
    pool = subject.runtime.pool
    with subject.read("The base of all of them. " * 20) as reading:
        base = pool.used_pages
        forks = [reading.fork() for _ in range(32)]
        assert pool.used_pages == base
        for number, fork in enumerate(forks):
            fork.feed(f"{number:064d}")
        assert pool.used_pages <= base + 2 * len(forks)
        for fork in forks:
            fork.close()
        assert pool.used_pages == base
