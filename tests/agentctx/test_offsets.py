"""Characters to tokens and back, on any text and for tokenizers of several kinds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from agentctx.memory.errors import InputError
from agentctx.memory.offsets import Offsets
from agentctx.models.tokenizer import Tokenizer as OurTokenizer
from agentctx.paths import Paths
from agentctx.reading.tokens import Tokens

CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>"]
CORPUS = ["The court ruled.", "  two  blanks ", "naïve Łódź 東京 🙂 👩‍👩‍👧", "a\n\n\tb"] * 3
PIECES = [*CONTROLS, "<|im_", "end|>", " x", "é", "e\u0301", "🙂", "\n", "  ", "ﬁ", "東京"]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


@cache
def tokens(kind: str) -> Tokens:
    """A tokenizer that keeps blanks in its ranges, one that cuts them off, one that normalises, marks
    words in front and has bytes for what it does not know.
    """
    backend: Any
    if kind == "words":
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = {token: at for at, token in enumerate(["<unk>", *bytes_, "▁", *"theT courd.nbak"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=300, initial_alphabet=LETTERS, show_progress=False)
        backend.train_from_iterator(CORPUS, trainer)
        if kind == "trimmed":
            backend.post_processor = processors.ByteLevel(trim_offsets=True)
    wrapper: Any = PreTrainedTokenizerFast
    fast = wrapper(tokenizer_object=backend, bos_token="<s>", extra_special_tokens=CONTROLS[:2])
    return Tokens(OurTokenizer.of(fast))


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "words"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS, data=st.data())
def test_every_character_is_in_the_tokens_that_hold_it(kind: str, text: str, data: st.DataObject) -> None:
    subject = tokens(kind)
    ids, offsets = subject.data(text)
    assert len(ids) == len(offsets) and offsets.characters == len(text)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    found = offsets.tokens(start, end)
    if start == end or not ids:
        assert not found
        return
    first, last = offsets.span(found.start, found.stop)
    assert 0 <= first <= start < end <= last <= len(text)
    for at in range(len(ids)):
        low, high = offsets.span(at, at + 1)
        assert (at in found) == (low < end and high > start) or low == high
    if kind == "bytes":  # which loses nothing
        assert text[start:end] in subject.backend.decode([ids[at] for at in found])
        assert subject.backend.decode(ids) == text


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "words"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_no_text_is_a_control_token(kind: str, text: str) -> None:
    subject = tokens(kind)
    controls = {subject.backend.token_to_id(control) for control in CONTROLS}
    assert not controls & set(subject.data(text).ids)
    assert set(subject.prompt("<s>")) <= controls


def test_a_character_in_several_tokens_needs_all_of_them() -> None:
    ids, offsets = tokens("bytes").data("a🙂𝔘b")
    assert len(ids) > 5
    assert list(offsets.tokens(2, 3)) == [at for at in range(len(ids)) if offsets.span(at, at + 1) == (2, 3)]
    assert len(offsets.tokens(2, 3)) == 4


def test_cut_blanks_belong_to_the_token_after_them_and_the_last_ones_to_the_last() -> None:
    offsets = Offsets([(1, 3), (5, 6)], 8)
    assert [offsets.span(at, at + 1) for at in range(2)] == [(0, 3), (3, 8)]
    assert [list(offsets.tokens(at, at + 1)) for at in range(8)] == [[0]] * 3 + [[1]] * 5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(a=TEXTS, b=TEXTS)
def test_a_text_after_a_text(a: str, b: str) -> None:
    first, second = tokens("bytes").data(a).offsets, tokens("bytes").data(b).offsets
    both = first.joined(second)
    assert both.characters == len(a + b) and len(both) == len(first) + len(second)
    assert all(both.span(len(first) + at, len(first) + at + 1)[0] >= len(a) for at in range(len(second)))
    assert list(both.tokens(0, len(a))) == list(first.tokens(0, len(a)))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="character 2 is half a surrogate pair"):
        tokens("bytes").data("ab\ud800")


@pytest.mark.model
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS, data=st.data())
def test_the_embedded_model_s_tokens(embedded: Paths, text: str, data: st.DataObject) -> None:
    subject = real(embedded)
    ids, offsets = subject.data(text)
    assume(subject.backend.decode(ids) == text)  # its vocabulary lacks the first bytes of rare planes
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    found = offsets.tokens(start, end)
    assert text[start:end] in subject.backend.decode([ids[at] for at in found])
    assert not set(ids) & set(subject.prompt("<|im_start|><|im_end|>"))


@cache
def real(paths: Paths) -> Tokens:
    return Tokens(OurTokenizer.load(paths.models / "smollm2" / "safetensors"))
