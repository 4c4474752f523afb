"""The reader against an unbatched reference, on a tiny random model and on the embedded one."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from agentctx.memory.errors import InputError, ModelError
from agentctx.models.reader import TransformersReader

AFTER = "\n\nThis text answers the question:"
QUESTION = "who keeps the light?"
TEXTS = [
    "The light is kept by Tobias Renn.",
    "",
    "Geese.",
    "A long passage about the weather in the Sound, with squalls from the north-west " * 3,
    "Zwölf Stufen aus Granit – 十二の石段 🗿",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: any text, no file."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def tiny(dtype: torch.dtype = torch.float32, window: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.3,  # large, so that scores differ
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def reader(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: int) -> TransformersReader:
    return TransformersReader(model, tokenizer, lock=threading.Lock(), **options)


def reference(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, text: str) -> float:
    """The definition: one text, one pass, no cache."""
    before = tokenizer(f"{text}{AFTER}").input_ids
    asked = tokenizer(f" {question}").input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([before + asked])).logits[0, len(before) - 1 : -1].float()
    return float(logits.log_softmax(-1)[range(len(asked)), asked].mean())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
async def test_scores_equal_the_unbatched_reference(tokenizer, dtype, tolerance) -> None:
    model = tiny(dtype)
    subject = reader(model, tokenizer)
    expected = [reference(model, tokenizer, QUESTION, text) for text in TEXTS]
    assert max(expected) - min(expected) > 10 * tolerance  # else equality would say nothing
    first = await subject.likelihood(QUESTION, TEXTS)
    again = await subject.likelihood(QUESTION, TEXTS)
    assert first.values == pytest.approx(expected, abs=tolerance)
    assert again.values == first.values


async def test_scores_do_not_depend_on_the_company(tokenizer) -> None:
    subject = reader(tiny(), tokenizer)
    together = await subject.likelihood(QUESTION, TEXTS)
    for text, value in zip(TEXTS, together.values, strict=True):
        alone = await reader(tiny(), tokenizer).likelihood(QUESTION, [text])
        assert alone.values[0] == pytest.approx(value, abs=1e-4)
    backwards = await subject.likelihood(QUESTION, TEXTS[::-1])
    assert backwards.values == pytest.approx(together.values[::-1], abs=1e-4)


async def test_a_text_is_computed_once_and_counted_exactly(tokenizer) -> None:
    subject = reader(tiny(), tokenizer)
    contexts = sum(len(tokenizer(f"{text}{AFTER}").input_ids) - 1 for text in TEXTS)
    asked, other = (len(tokenizer(f" {q}").input_ids) for q in (QUESTION, "and where?"))
    first = await subject.likelihood(QUESTION, TEXTS + TEXTS)
    assert (first.computed_tokens, first.reused_tokens) == (contexts + asked * len(TEXTS), 0)
    assert first.values[: len(TEXTS)] == first.values[len(TEXTS) :]
    assert first.computed_tokens == subject.likelihood_cost(QUESTION, TEXTS)
    second = await subject.likelihood("and where?", TEXTS)
    assert (second.computed_tokens, second.reused_tokens) == (other * len(TEXTS), contexts)
    assert second.computed_tokens <= subject.likelihood_cost("and where?", TEXTS)


async def test_what_is_kept_stays_within_its_bytes_and_the_oldest_leaves(tokenizer) -> None:
    one = reader(tiny(), tokenizer)
    await one.likelihood(QUESTION, ["a" * 50])
    size = one.kept_bytes
    subject = reader(tiny(), tokenizer, kv_bytes=2 * size)
    for letter in "abac":  # b is the least recently used when c comes
        await subject.likelihood(QUESTION, [letter * 50])
        assert subject.kept_bytes <= 2 * size
    reused = {x: (await subject.likelihood(QUESTION, [x * 50])).reused_tokens > 0 for x in "acb"}
    assert reused == {"a": True, "c": True, "b": False}


async def test_a_budget_of_nothing_keeps_nothing_and_scores_the_same(tokenizer) -> None:
    kept, unkept = reader(tiny(), tokenizer), reader(tiny(), tokenizer, kv_bytes=0)
    expected = await kept.likelihood(QUESTION, TEXTS)
    for _ in range(2):
        assert await unkept.likelihood(QUESTION, TEXTS) == expected
        assert unkept.kept_bytes == 0


async def test_too_long_for_the_window_is_an_error_that_names_it(tokenizer) -> None:
    subject = reader(tiny(window=64), tokenizer)
    with pytest.raises(ModelError, match="window of 64.*'goose goose") as caught:
        await subject.likelihood("where?", ["fits", "goose " * 20])
    assert caught.value.code == "overflow"


async def test_a_blank_question_is_refused_and_no_texts_are_free(tokenizer) -> None:
    subject = reader(tiny(), tokenizer)
    with pytest.raises(InputError, match="empty"):
        await subject.likelihood(" \n", ["text"])
    nothing = await subject.likelihood(QUESTION, [])
    assert (nothing.values, nothing.computed_tokens) == ((), 0)


async def test_the_loop_runs_on_while_another_holds_the_model(tokenizer) -> None:
    lock = threading.Lock()
    subject = TransformersReader(tiny(), tokenizer, lock=lock)
    with lock:
        waiting = asyncio.create_task(subject.likelihood(QUESTION, TEXTS))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not waiting.done()
    assert len((await waiting).values) == len(TEXTS)


async def test_a_cancelled_call_frees_the_model_and_the_next_one_is_right(tokenizer) -> None:
    lock = threading.Lock()
    subject = TransformersReader(tiny(), tokenizer, lock=lock)
    with lock:
        waiting = asyncio.create_task(subject.likelihood(QUESTION, TEXTS))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    expected = await reader(tiny(), tokenizer).likelihood(QUESTION, TEXTS)
    assert (await subject.likelihood(QUESTION, TEXTS)).values == pytest.approx(expected.values, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 64])
async def test_the_size_of_a_batch_changes_no_score(tokenizer, monkeypatch, rows: int) -> None:
    expected = await reader(tiny(), tokenizer).likelihood(QUESTION, TEXTS)
    monkeypatch.setattr("agentctx.models.reader._LOGIT_ROWS", rows * len(tokenizer(f" {QUESTION}").input_ids))
    batched = await reader(tiny(), tokenizer).likelihood(QUESTION, TEXTS)
    assert batched.values == pytest.approx(expected.values, abs=1e-4)
    assert batched.computed_tokens == expected.computed_tokens


@pytest.mark.model
async def test_the_embedded_model_finds_the_passage() -> None:
    folder = os.environ.get("AGENTCTX_TEST_MODEL", "")
    if not Path(folder, "config.json").is_file():
        pytest.skip("AGENTCTX_TEST_MODEL does not name a model folder")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    subject = TransformersReader(model, AutoTokenizer.from_pretrained(folder), lock=threading.Lock())
    texts = [
        "A spider no longer than a grain of rice. It spins between the stems of sea lavender, and when a "
        "spring tide is due it closes itself into a purse of silk that holds air for up to seven hours.",
        "The hoist is rated for 500 kg and was last inspected in November 2020.",
        "Loans had risen from 9,400 to 11,250 over the year.",
        "The rent is payable in advance on the first working day of each month by bank transfer.",
    ]
    questions = [
        "how do arachnids breathe when submerged?",
        "how much weight can the hoist lift?",
        "do people borrow more books?",
    ]
    for expected, question in enumerate(questions):
        values = (await subject.likelihood(question, texts)).values
        assert max(range(len(texts)), key=values.__getitem__) == expected
