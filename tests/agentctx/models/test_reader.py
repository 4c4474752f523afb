"""The reader against an unbatched reference, on a tiny random model and on the embedded one."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from agentctx.memory.errors import InputError, ModelError
from agentctx.models.load import Model
from agentctx.models.reader import LikelihoodReader
from agentctx.models.tokenizer import Tokenizer
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.retrieve.heads import heads_of

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
def tokenizer() -> Tokenizer:
    """Bytes as tokens: any text, no file."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Backend(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return Tokenizer(bare, {}, None)


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


def reader(model: LlamaForCausalLM, tokenizer: Tokenizer, memory_bytes: int = 32 << 20) -> LikelihoodReader:
    return LikelihoodReader(engine(model, memory_bytes), tokenizer)


def engine(model: LlamaForCausalLM, memory_bytes: int = 32 << 20) -> Engine:
    body = LlamaDecoder(model.config.to_dict(), model.state_dict(), model.dtype)
    return Engine(body, fingerprint="tiny", memory_bytes=memory_bytes)


def reference(model: LlamaForCausalLM, tokenizer: Tokenizer, question: str, text: str) -> float:
    """The definition: one text, one pass, no cache."""
    before = tokenizer.encode(f"{text}{AFTER}")
    asked = tokenizer.encode(f" {question}")
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
    contexts = sum(len(tokenizer.encode(f"{text}{AFTER}")) - 1 for text in TEXTS)
    asked, other = (len(tokenizer.encode(f" {q}")) for q in (QUESTION, "and where?"))
    first = await subject.likelihood(QUESTION, TEXTS + TEXTS)
    assert (first.computed_tokens, first.reused_tokens) == (contexts + asked * len(TEXTS), 0)
    assert first.values[: len(TEXTS)] == first.values[len(TEXTS) :]
    assert first.computed_tokens == subject.likelihood_cost(QUESTION, TEXTS)
    second = await subject.likelihood("and where?", TEXTS)
    assert (second.computed_tokens, second.reused_tokens) == (other * len(TEXTS), contexts)
    assert second.computed_tokens <= subject.likelihood_cost("and where?", TEXTS)


@pytest.mark.parametrize("method", ["likelihood", "entropy", "attention", "focal"])
async def test_every_token_that_is_computed_for_spans_is_counted(tokenizer, monkeypatch, method) -> None:
    shared, texts = engine(tiny()), [TEXTS[0], TEXTS[3]]
    fed: list[int] = []
    step = shared.step

    def counted(contexts, ids, pads=(), *, spoken=False):
        fed.append(ids.numel() - sum(pads))
        return step(contexts, ids, pads, spoken=spoken)

    monkeypatch.setattr(shared, "step", counted)
    heads_of(shared, None)
    probe = sum(fed) if method in ("attention", "focal") else 0  # of the model, not of a text
    for reused in (False, True):
        fed.clear()
        found = await LikelihoodReader(shared, tokenizer).score_spans(QUESTION, texts, method=method)
        assert found.computed_tokens == sum(fed) - probe > 0
        assert bool(found.reused_tokens) is reused


@pytest.mark.parametrize("method", ["likelihood", "entropy", "attention", "focal"])
async def test_what_fills_the_window_is_scored_and_one_more_token_is_refused(tokenizer, method) -> None:
    hint = len("\nThe answer is") if method in ("entropy", "focal") else 0
    asked = len(tokenizer.encode(f" {QUESTION}")) + hint
    read = len(AFTER) - 1 + asked + (method != "likelihood")
    for window, fits in ((80 + read, True), (79 + read, False)):
        subject = reader(tiny(window=window), tokenizer)
        if fits:
            assert (await subject.score_spans(QUESTION, ["g" * 80], method=method)).values[0]
        else:
            with pytest.raises(ModelError, match=f"window of {window}: 'gggg"):
                await subject.score_spans(QUESTION, ["g" * 80], method=method)


async def test_little_memory_keeps_what_was_used_last_and_scores_the_same(tokenizer) -> None:
    model = tiny()
    page = engine(model).body.shape.page_bytes
    subject = reader(model, tokenizer, 8 * page)  # three texts of two pages with their questions, not four
    values = {}
    for letter in "abcadb":
        scores = await subject.likelihood(QUESTION, [letter * 50])
        assert scores.values == pytest.approx(values.setdefault(letter, scores.values), abs=1e-4)
    last = await subject.likelihood(QUESTION, ["b" * 50])
    assert last.reused_tokens == 50 + len(AFTER) - 1


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
    shared = engine(tiny())
    subject = LikelihoodReader(shared, tokenizer)
    with shared.lock:
        waiting = asyncio.create_task(subject.likelihood(QUESTION, TEXTS))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not waiting.done()
    assert len((await waiting).values) == len(TEXTS)


async def test_a_cancelled_call_frees_the_model_and_the_next_one_is_right(tokenizer) -> None:
    shared = engine(tiny())
    subject = LikelihoodReader(shared, tokenizer)
    with shared.lock:
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
    monkeypatch.setattr("agentctx.models.reader._LOGIT_ROWS", rows * len(tokenizer.encode(f" {QUESTION}")))
    batched = await reader(tiny(), tokenizer).likelihood(QUESTION, TEXTS)
    assert batched.values == pytest.approx(expected.values, abs=1e-4)
    assert batched.computed_tokens == expected.computed_tokens


@pytest.mark.model
async def test_the_embedded_model_finds_the_passage(embedded_model: Model) -> None:
    subject = embedded_model.reader
    assert subject is not None
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
