"""The engine on a small model of random weights: a text is computed once, and everything else follows."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agentctx.memory.errors import ModelError, StoreError
from agentctx.memory.kv import store as store_module
from agentctx.memory.kv.store import BlockStore
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.sampling import Sampling, generate

ROOT = Path(__file__).parents[2]
TEXT = [(7 * i * i + 3 * i) % 250 for i in range(700)]  # ten whole blocks and an open one
QUESTION = [5, 6, 7, 8]


@functools.cache
def decoder() -> LlamaDecoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,  # large, so that a wrong past changes the answer
    )
    model = LlamaForCausalLM(config)
    return LlamaDecoder(config.to_dict(), model.state_dict(), torch.float32)


def engine(kv: Path | None = None, *, pages: int = 64, codec: str = "plain") -> Engine:
    body = decoder()
    store = BlockStore(kv, "tiny", budget=1 << 30, codec=codec) if kv else None
    return Engine(body, fingerprint="tiny", memory_bytes=pages * body.shape.page_bytes, store=store)


@pytest.fixture
def kv(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def answer(context: Context, question: Sequence[int] = QUESTION, most: int = 12) -> list[int]:
    """Greedy ids after a question, asked in a fork."""
    fork = context.fork()
    hidden = fork.feed(question)
    found = generate(
        fork, hidden, most=most, ends=frozenset(), sampling=Sampling(), cancelled=threading.Event()
    )
    ids = list(found)
    fork.close()
    return ids


@functools.cache
def expected() -> list[int]:
    return answer(engine().read(TEXT))


def block_files(kv: Path) -> list[Path]:
    return sorted(kv.glob("*/*/*.kv"))


def test_a_text_is_read_once_in_memory_and_across_engines(kv: Path) -> None:
    first = engine(kv)
    context = first.read(TEXT, keep=True)
    assert (context.computed, context.reused, context.warnings) == (len(TEXT), 0, [])
    assert len(block_files(kv)) == 11
    again = first.read(TEXT, keep=True)
    assert (again.computed, again.reused) == (0, len(TEXT))
    assert again.table.pages == context.table.pages
    other = engine(kv).read(TEXT, keep=True)
    assert (other.computed, other.reused) == (0, len(TEXT))
    assert answer(other) == answer(again) == answer(context) == expected()


def test_what_is_not_to_be_kept_is_not_on_disk(kv: Path) -> None:
    engine(kv).read(TEXT)
    assert block_files(kv) == []


def test_a_changed_tail_is_computed_from_its_block_on(kv: Path) -> None:
    engine(kv).read(TEXT, keep=True)
    for changed, reused in (
        (TEXT + [9, 9, 9], 640),
        ([*TEXT[:500], 1, *TEXT[501:]], 448),
        ([1, *TEXT[1:]], 0),
    ):
        context = engine(kv).read(changed)
        assert (context.reused, context.computed) == (reused, len(changed) - reused)
        assert answer(context) == answer(engine().read(changed))


def test_a_beginning_that_two_texts_share_is_held_once() -> None:
    subject = engine()
    one = subject.read(TEXT)
    used = subject.pool.used_pages
    two = subject.read([*TEXT[:640], 1, 2, 3])
    assert two.reused == 640 and subject.pool.used_pages == used + 1
    assert two.table.pages[:10] == one.table.pages[:10]


def test_forks_copy_nothing_until_they_write(kv: Path) -> None:
    subject = engine()
    context = subject.read(TEXT)
    used = subject.pool.used_pages
    forks = [context.fork() for _ in range(20)]
    assert subject.pool.used_pages == used == 11
    for number, fork in enumerate(forks):
        fork.feed([number])
    assert subject.pool.used_pages == used + 20  # the open block of each
    for fork in forks:
        fork.close()
    assert subject.pool.used_pages == used
    assert answer(context) == expected()


def test_separate_forks_answer_as_if_alone() -> None:
    context = engine().read(TEXT)
    questions = [[n, n + 1] for n in range(4)]
    together = [answer(context, question) for question in questions]
    assert together == [answer(engine().read(TEXT), question) for question in questions]


def test_the_same_question_gets_the_same_answer_whatever_came_between(kv: Path) -> None:
    subject = engine(kv)
    prompt = [*TEXT, *QUESTION]
    found = []
    for other in (TEXT[:50], TEXT[100:400], [*TEXT[:300], 4]):
        context, hidden = subject.begin(prompt, keep=True)
        assert context.computed + context.reused == len(prompt)
        ids = generate(
            context, hidden, most=12, ends=frozenset(), sampling=Sampling(), cancelled=threading.Event()
        )
        found.append(list(ids))
        context.close()
        subject.begin(other)[0].close()
    assert found == [expected()] * 3


def test_sampling_follows_its_seed_alone() -> None:
    context = engine().read(TEXT)

    def sample(seed: int) -> list[int]:
        fork = context.fork()
        hidden = fork.feed(QUESTION)
        sampling = Sampling(temperature=1.0, seed=seed)
        ids = generate(
            fork, hidden, most=20, ends=frozenset(), sampling=sampling, cancelled=threading.Event()
        )
        return list(ids)

    assert sample(1) == sample(1) != sample(2)


def test_a_prompt_s_last_token_is_always_computed(kv: Path) -> None:
    subject = engine(kv)
    prompt = TEXT[:640]  # ends with its block
    for reused in (0, 576, 576):
        context, hidden = subject.begin(prompt, keep=True)
        assert (context.reused, context.computed) == (reused, 640 - reused)
        assert hidden is not None
        context.close()
    assert len(block_files(kv)) == 10


def test_the_open_end_of_a_prompt_is_not_kept(kv: Path) -> None:
    engine(kv).begin(TEXT, keep=True)
    assert len(block_files(kv)) == 10


def test_a_cancelled_read_keeps_its_blocks_and_goes_on(kv: Path) -> None:
    cancelled = threading.Event()
    seen: list[tuple[int, int]] = []

    def progress(held: int, wanted: int) -> None:
        seen.append((held, wanted))
        cancelled.set()

    context = engine(kv).read(TEXT, keep=True, cancelled=cancelled, progress=progress)
    assert seen == [(512, 700)] and context.ids == TEXT[:512]
    assert len(block_files(kv)) == 8
    later = engine(kv).read(TEXT, keep=True)
    assert (later.reused, later.computed) == (512, 188)
    assert answer(later) == expected()


def test_several_texts_are_read_as_each_alone(kv: Path) -> None:
    texts = [TEXT[:n] for n in (1, 30, 64, 65, 200, 700)] + [TEXT[300:500], TEXT[:30]]
    found = engine(kv).read_all(texts, keep=True)
    for ids, context in zip(texts, found, strict=True):
        assert context.ids == ids and context.computed + context.reused == len(ids)
        assert answer(context) == answer(engine().read(ids))
    again = engine(kv).read_all(texts)
    assert [context.computed for context in again] == [0] * len(texts)


def test_beyond_the_window_is_refused_before_anything_is_computed() -> None:
    subject = engine()
    for call in (subject.read, subject.begin, lambda ids: subject.read_all([TEXT, ids])):
        with pytest.raises(ModelError, match="1,025 tokens exceed the model's window of 1,024") as caught:
            call([1] * 1025)
        assert caught.value.code == "overflow"
    assert subject.pool.used_pages == 11  # what was read before is remembered, nobody holds it
    assert subject.prefixes.pool.free_pages + 11 == subject.pool.capacity


@pytest.mark.parametrize("call", ["read", "begin", "read_all"])
def test_a_text_larger_than_the_memory_fails_whole_and_leaks_nothing(call: str, kv: Path) -> None:
    subject = engine(kv, pages=6)
    given: list[object] = [TEXT] if call != "read_all" else [[TEXT[:100], TEXT]]
    with pytest.raises(ModelError) as caught:
        getattr(subject, call)(*given)
    assert caught.value.code == "out_of_memory"
    subject.prefixes.clear()
    assert subject.pool.used_pages == 0
    assert answer(subject.read(TEXT[:300]), most=3) == answer(engine().read(TEXT[:300]), most=3)


def test_a_flipped_byte_in_any_block_is_told_and_computed_again(kv: Path) -> None:
    text = TEXT[:200]
    right = answer(engine(kv).read(text, keep=True), most=4)
    for path in block_files(kv):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4  # in the tensors; tests/memory flips all of the header
        path.write_bytes(data)
        context = engine(kv).read(text, keep=True)
        assert len(context.warnings) == 1 and str(path) in context.warnings[0]
        assert "damaged" in context.warnings[0] and context.computed > 0
        assert answer(context, most=4) == right
        clean = engine(kv).read(text)
        assert (clean.computed, clean.warnings) == (0, [])


def test_another_version_is_an_error_that_says_what_to_do(kv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "VERSION", "0")
        engine(kv).read(TEXT, keep=True)
    subject = engine(kv)
    with pytest.raises(StoreError) as caught:
        subject.read(TEXT)
    assert caught.value.code == "version" and caught.value.hint
    assert subject.pool.used_pages == 0


def test_a_full_disk_costs_a_warning_and_no_answer(kv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = os.replace, [3]

    def full(source: str, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        context = engine(kv).read(TEXT, keep=True)
    assert "No space left" in context.warnings[0] and "read again next time" in context.warnings[0]
    assert answer(context) == expected()
    assert len(block_files(kv)) == 2 and not list(kv.glob("*/*/.*"))  # one replace was for about.json
    later = engine(kv).read(TEXT, keep=True)
    assert (later.reused, later.warnings) == (128, []) and answer(later) == expected()


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_coded_store_is_close(kv: Path, codec: str) -> None:
    exact = engine(kv, codec=codec).read(TEXT, keep=True)
    coded = engine(kv, codec=codec).read(TEXT)
    assert coded.computed == 0
    k, _ = exact.engine.pool.read(exact.table.pages[3], 64)
    q, _ = coded.engine.pool.read(coded.table.pages[3], 64)
    assert 0 < float((k - q).abs().max()) < float(k.abs().max()) / {"int8": 100, "int4": 6}[codec]


class Memory(RuleBasedStateMachine):
    """Texts that begin alike are read, asked and dropped in a pool for a few of them: the budget holds, and
    every answer is that of an engine with room for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.roomy = engine(pages=400)
        self.engine = engine(pages=9)
        self.held: list[Context] = []

    @rule(start=st.integers(0, 2), size=st.integers(1, 400), end=st.integers(0, 3))
    def read(self, start: int, size: int, end: int) -> None:
        ids = [*TEXT[start : start + size], end]
        before = self.engine.pool.used_pages
        owned = {page for context in self.held for page in context.table.pages}
        try:
            context = self.engine.read(ids)
        except ModelError as error:
            assert error.code == "out_of_memory"
            assert len(owned) + -(-len(ids) // 64) > self.engine.pool.capacity  # prefixes gave way
            assert before <= self.engine.pool.capacity
            return
        assert context.ids == ids and context.computed + context.reused == len(ids)
        self.held.append(context)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), question=st.lists(st.integers(0, 250), min_size=1, max_size=70))
    def ask(self, which: int, question: list[int]) -> None:
        context = self.held[which % len(self.held)]
        try:
            hidden = self._hidden(context, question)
        except ModelError:
            return
        exact = self.roomy.read(context.ids)
        right = self._hidden(exact, question)
        exact.close()
        assert torch.allclose(hidden, right, atol=1e-4)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        self.held.pop(which % len(self.held)).close()

    @invariant()
    def the_budget_holds(self) -> None:
        pool = self.engine.pool
        assert pool.used_bytes <= pool.budget
        owned = {page for context in self.held for page in context.table.pages}
        assert len(owned) <= pool.used_pages

    def teardown(self) -> None:
        for context in self.held:
            context.close()
        self.engine.prefixes.clear()
        assert self.engine.pool.used_pages == 0

    @staticmethod
    def _hidden(context: Context, question: list[int]) -> Tensor:
        fork = context.fork()
        try:
            hidden = fork.feed(question)
        finally:
            fork.close()
        assert hidden is not None
        return hidden


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=8, stateful_step_count=12, deadline=None, derandomize=True)

CHILD = """
    import json, sys, threading
    from pathlib import Path
    from agentctx.models.weights import Weights

    weights = Weights.load(Path(sys.argv[1]), name="tiny", kv=Path(sys.argv[2]), memory_bytes=64 << 20)
    ids = weights.tokenizer.encode(sys.argv[3])
    context = weights.engine.read(ids, keep=True)
    hidden = context.fork().feed([5, 6, 7])
    said = [float(x) for x in weights.engine.logits(hidden)[:8]]
    print(json.dumps([len(ids), context.computed, context.reused, context.warnings, said]))
"""


def process(folder: Path, kv: Path, text: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(kv), text]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(child: subprocess.Popen[str]) -> list[object]:
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    found: list[object] = json.loads(out)
    return found


def test_a_second_process_computes_nothing_and_says_the_same(tiny_model: Path, kv: Path) -> None:
    text = "The court ruled on 3 May. " * 30
    tokens, computed, reused, warnings, said = result(process(tiny_model, kv, text))
    assert (computed, reused, warnings) == (tokens, 0, [])
    assert result(process(tiny_model, kv, text)) == [tokens, 0, tokens, [], said]
    tokens, computed, reused, _, _ = result(process(tiny_model, kv, text + "Nobody appealed."))
    assert isinstance(tokens, int) and (computed, reused) == (tokens - tokens // 64 * 64, tokens // 64 * 64)


def test_two_processes_at_once_are_both_right(tiny_model: Path, kv: Path) -> None:
    text = "Nobody appealed, and the ruling stood. " * 20
    first, second = (result(child) for child in [process(tiny_model, kv, text) for _ in range(2)])
    third = result(process(tiny_model, kv, text))
    assert first[-1] == second[-1] == third[-1]
    assert third[1:4] == [0, third[0], []] and first[3] == second[3] == []
    assert not list(kv.glob("*/*/.*"))


def test_what_was_in_memory_only_goes_to_disk_when_it_is_to_be_kept(kv: Path) -> None:
    first = engine(kv)
    first.read(TEXT).close()
    assert not list(kv.rglob("*.kv"))
    assert first.read(TEXT, keep=True).computed == 0
    assert engine(kv).read(TEXT).computed == 0
