from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import BaseMessage
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Document, Locator, Span
from agentctx.workflows.split import pack, split, split_many, text_of

PROSE = (
    "The committee met on 3 May 1934 in Paris. It had been called by Dr. Brown, who wished it ended. "
    "Nobody spoke for a while; then everybody spoke at once, and the clerk wrote down what he could.\n\n"
)


def _trained() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([PROSE * 3, "aaaa aaaaaaaa 日本語 日本語 👍🏽👍🏽" * 5], trainer)
    return tokenizer


@dataclass
class Bytes:
    exact: bool = True
    seen: int = 0

    def count_text(self, text: str) -> int:
        self.seen += len(text)
        return len(text.encode("utf-8", "surrogatepass"))

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        return sum(self.count_text(message.text) for message in messages)


class Words(Bytes):
    def count_text(self, text: str) -> int:
        self.seen += len(text)
        return len(text.split())


@dataclass
class Bpe(Bytes):
    """A real byte-level BPE, whose counts are not additive."""

    tokenizer: Tokenizer = field(default_factory=_trained)

    def count_text(self, text: str) -> int:
        self.seen += len(text)
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


COUNTERS = {"bytes": Bytes(), "words": Words(), "bpe": Bpe()}

hostile = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.sampled_from(
            [
                PROSE,
                "# A heading\n",
                "\r\n\r\n",
                "👩‍👩‍👧",
                "日本語。",
                " " * 500,
                "\n" * 90,
                "a" * 700,
                "\u0301",
            ]
        ),
    ),
    max_size=12,
).flatmap(lambda parts: st.integers(1, 8).map(lambda times: "".join(parts) * times))


@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS.keys())
@settings(max_examples=60, deadline=None)
@given(text=hostile, limit=st.integers(64, 300))
def test_chunks_fit_cover_and_are_half_full(counter: Bytes, text: str, limit: int) -> None:
    document = Document.of(text)
    chunks = split(document, limit, counter)
    documents = {document.id: document}
    texts = [text_of(chunk, documents) for chunk in chunks]
    assert "".join(texts) == text
    assert [chunk.tokens for chunk in chunks] == [counter.count_text(piece) for piece in texts]
    assert all(texts)
    assert all(chunk.tokens <= limit for chunk in chunks)
    assert all(chunk.tokens * 2 >= limit for chunk in chunks[:-1])
    assert split(document, limit, counter) == chunks


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("one two three. " * 12 + "\n\n# Heading\nfour five six. " * 12, "# Heading"),
        ("one two three. " * 12 + "\n\nfour five six seven. " * 20, "four"),
        ("one two three four. " * 40, "one"),
        ("many words and no full stop " * 40, ("many", "words", "and", "no", "full", "stop")),
    ],
)
def test_cuts_at_the_best_boundary_there_is(text: str, starts: str | tuple[str, ...]) -> None:
    document = Document.of(text)
    chunks = split(document, 256, Bytes())
    assert len(chunks) > 2
    assert all(text_of(chunk, {document.id: document}).startswith(starts) for chunk in chunks[1:])


def test_a_locator_of_the_loader_is_a_heading() -> None:
    text = "Sentence number one. " * 20
    place = text.index("Sentence", 200)
    document = Document.of(text, locators=(Locator(place, len(text), "chapter", "II"),))
    assert split(document, 256, Bytes())[0].span.end == place


@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS.keys())
@pytest.mark.parametrize("text", [PROSE * 700, "a" * 100_000, " " * 100_000, "\n" * 100_000, "👍" * 50_000])
@pytest.mark.parametrize("limit", [200, 2000])
def test_counts_only_a_few_times_the_text(counter: Bytes, text: str, limit: int) -> None:
    counter.seen = 0
    split(Document.of(text), limit, counter)
    assert counter.seen < 8 * len(text)


def test_refuses_a_limit_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="63"):
        split(Document.of("x"), 63, Bytes())

    class Heavy(Bytes):
        def count_text(self, text: str) -> int:
            return 100 * len(text)

    with pytest.raises(ConfigError, match="'x'"):
        split(Document.of("x"), 64, Heavy())


def test_chunks_never_cross_documents() -> None:
    documents = [Document.of(text) for text in ("", "short", PROSE * 3, "last")]
    chunks = split_many(documents, 200, Bytes())
    assert chunks == [chunk for document in documents for chunk in split(document, 200, Bytes())]
    assert len(split(documents[0], 200, Bytes())) == 0


sizes = st.lists(st.integers(0, 100), max_size=40)


@given(sizes, st.integers(0, 30))
def test_packs_keep_order_and_fit(sizes: list[int], label: int) -> None:
    chunks = [Chunk(Span("d", i, i + 1), tokens) for i, tokens in enumerate(sizes)]
    packs = pack(chunks, 130, label_tokens=label)
    assert [chunk for group in packs for chunk in group] == chunks
    loads = [sum(chunk.tokens + label for chunk in group) for group in packs]
    assert all(load <= 130 for load in loads)
    assert all(group for group in packs)
    for load, following in zip(loads, packs[1:], strict=False):
        assert load + following[0].tokens + label > 130


def test_pack_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ConfigError, match="90 tokens and its label of 20 are over 100"):
        pack([Chunk(Span("d", 0, 1), 90)], 100, label_tokens=20)
