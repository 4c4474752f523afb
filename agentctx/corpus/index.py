"""The index of what a local model has read: every passage once, by itself, behind the same short beginning.

    index = Index.open(paths.index, model)
    index.add("notes", documents)

A passage is read behind what opens a user's turn, so that the first tokens, to which every later one attends
whatever they are (arXiv 2309.17453), are the same for all. Its KV goes to the block store in 8 bits: in
`benchmarks/results/kv_dtype.json` the loss does not rise by that, at half the bytes. What was kept so is
known apart from texts that were kept as they are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_core.language_models import BaseChatModel
from torch import Tensor

from agentctx.corpus.chat import ComposedChat, Kept
from agentctx.corpus.held import loosen, opened, prune
from agentctx.corpus.keys import QUESTIONS, Measure, router_layers, unrotated
from agentctx.memory.errors import ModelError, StoreError
from agentctx.memory.kv.catalog import Catalog, Passage, passage_name
from agentctx.memory.kv.dtype import Keep
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.kv.quantised import QuantisedPool
from agentctx.memory.kv.shelf import FULL
from agentctx.memory.types import Document
from agentctx.memory.vectors import Vectors
from agentctx.models.local import LocalChat
from agentctx.models.reader import LikelihoodReader
from agentctx.reading.frame import turn
from agentctx.workflows.ports import Scores
from agentctx.workflows.split import split

if TYPE_CHECKING:
    from agentctx.models.load import Model
    from agentctx.runtime.context import Context

PASSAGE_TOKENS = 200
TOGETHER = 32  # passages that are read, and become part of the index, at once
KEEP: Keep = "int8"
HEAD = 1024  # bytes of a block that are no keys or values, at most


@dataclass(frozen=True, slots=True)
class Added:
    """`passages` in all, of which `fresh` were not in the index, and the tokens that were computed."""

    passages: int
    fresh: int
    computed_tokens: int
    warnings: tuple[str, ...] = ()


class Index:
    """Implements `KVIndex`. Safe for several threads and processes. Raises StoreError as `Database` does."""

    def __init__(self, folder: Path, model: Model) -> None:
        """Made at `folder` if there is none. ModelError (unsupported) for what keeps no KV on disk."""
        if not usable(model):
            raise ModelError(
                f"{model.profile.name} as it is opened keeps nothing of what it reads that can be composed",
                code="unsupported",
                hint="name a local model with dense attention, kv_dtype auto and kv_bytes above 0",
            )
        assert isinstance(model.chat, LocalChat) and model.chat.weights.engine.store is not None
        self.chat = model.chat
        self.counter = model.counter
        self.engine = model.chat.weights.engine
        self.store = model.chat.weights.engine.store
        tokenizer = model.chat.weights.tokenizer
        self.before = tokenizer.encode(turn(model.chat.template)[0])
        self.reader = LikelihoodReader(self.engine, tokenizer, before=self.before, keep=KEEP)
        self.passage_tokens = min(PASSAGE_TOKENS, self.engine.window // 4)
        self.database = opened(folder)
        self.catalog = Catalog(self.database)
        shape = self.engine.body.shape
        self._shape = (len(router_layers(self.engine)), shape.kv_heads, shape.head_dim)
        self.vectors = Vectors(self.database, self._shape[0] * shape.kv_heads * shape.head_dim)
        self._check(model.profile.name)

    @classmethod
    def open(cls, root: Path, model: Model) -> Index:
        """The index of a model under `root`."""
        return cls(folder_of(root, model), model)

    def add(
        self,
        root: str,
        documents: Sequence[Document],
        *,
        cancel: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
        pin: bool = False,
    ) -> Added:
        """Index `documents` as what is at `root` now; what is in the index already is not read again.

        A batch of passages is in the index once it was read, so a killed or cancelled call goes on where it
        was. `progress` is told the tokens read and wanted. With `pin`, what is kept of `root` never leaves
        the disk to make room, now or later. Raises StoreError: no_space if the disk is full or the passages
        do not fit the budget of KV, unwritable; what was indexed until then stays.
        """
        cut = {one.source: (one.id, self._passages(one)) for one in documents}
        tokens = {text: count for _, found in cut.values() for text, count in found.items()}
        names = {source: (id_, [passage_name(x) for x in texts]) for source, (id_, texts) in cut.items()}
        replaced = self.catalog.enter(root, names)
        if pin:
            self._pin(root)
            self.catalog.pin(root)
        held = zip(tokens, self.held(list(tokens)), strict=True)
        fresh = {text: tokens[text] for text, there in held if not there}
        try:
            computed = self._read_all(fresh, cancel, progress) if fresh else 0
            if replaced:
                prune(self.catalog, self.vectors, self.store)
        finally:
            self.vectors.settle()
            if root in self.catalog.pinned():
                self._pin(root)
                loosen(self.catalog, self.store)  # what was in it before
        return Added(len(tokens), len(fresh), computed, tuple(self._told()))

    def _read_all(
        self,
        fresh: Mapping[str, int],
        cancel: threading.Event | None,
        progress: Callable[[int, int], None] | None,
    ) -> int:
        """Read these passages, given with their tokens, a few at a time; returns the tokens computed."""
        texts, total = list(fresh), sum(fresh.values())
        at = done = computed = 0
        room = self._room()
        while at < len(texts) and not (cancel is not None and cancel.is_set()):
            batch = texts[at : at + TOGETHER]
            count = self._fitting(batch, room)
            if not count:
                raise self._full(len(texts) - at)
            read, new = self._read({text: fresh[text] for text in batch[:count]})
            at += count
            room -= self._bytes(read)
            computed += new
            done += sum(one.tokens for one in read)
            if progress:
                progress(done, total)
        return computed

    def _pin(self, root: str) -> None:
        self.store.shelf.pin(self.store.files(self.catalog.blocks(root)))

    def _room(self) -> int:
        """Bytes that more passages may take, beside what there is of them and what is pinned."""
        shelf = self.store.shelf
        paths = self.store.files([name for one in self.catalog.passages().values() for name in one.blocks])
        shelf.touch(paths)  # other texts leave first
        return int(shelf.budget * FULL) - shelf.taken(set(paths))

    def held(self, texts: Sequence[str]) -> list[bool]:
        names = [passage_name(text) for text in texts]
        found = self.catalog.passages(names)
        return [
            not text.strip() or (name in found and self._complete(found[name]))
            for text, name in zip(texts, names, strict=True)
        ]

    def nearest_cost(self, question: str) -> int:
        return len(self._asked(question))

    async def nearest(self, question: str, texts: Sequence[str], k: int) -> Scores:
        return await asyncio.to_thread(self._nearest, question, texts, k)

    def composed(self, texts: Sequence[str]) -> BaseChatModel:
        fields = {name: getattr(self.chat, name) for name in type(self.chat).model_fields}
        # Alone, a control token in a text was read as one, and what follows it as another's turn: such a
        # passage is read in the prompt, which breaks them.
        texts = [text for text in texts if self.chat.template.plain(text)]
        first = len(self.before)
        kept = tuple(
            Kept(tuple(ids), first, first + self.counter.count_text(text))
            for text, ids in self.reader.held_as(texts).items()
        )
        return ComposedChat(**fields, kept=kept, keep=KEEP)

    def _nearest(self, question: str, texts: Sequence[str], k: int) -> Scores:
        if self.catalog.fact("measure") is None:  # whoever indexed was stopped before anything was read
            return Scores((float("-inf"),) * len(texts), 0, 0)
        ids = self._asked(question)
        with self._holding([ids], False) as (context,):
            count = len(ids) - len(self.before)
            vector = self._measure().question(unrotated(self.engine, context, len(self.before), count))
            computed, reused = context.computed, context.reused
        places: dict[str, list[int]] = {}
        for place, text in enumerate(texts):
            places.setdefault(passage_name(text), []).append(place)
        values = [float("-inf")] * len(texts)
        for hit in self.vectors.search(vector, k, list(places)):
            for place in places[hit.owner]:
                values[place] = hit.score
        return Scores(tuple(values), computed, reused, tuple(self._told()))

    def _read(self, texts: Mapping[str, int]) -> tuple[list[Passage], int]:
        """Read passages, given with their tokens, and make them part of the index; returns them and what was
        computed, in tokens.
        """
        ids = self.reader.held_as(list(texts))
        passages = [
            Passage(passage_name(text), texts[text], tuple(self.engine.kept(one, KEEP)))
            for text, one in ids.items()
        ]
        with self._holding(list(ids.values())) as contexts:
            keys = [
                unrotated(self.engine, context, len(self.before), one.tokens)
                for context, one in zip(contexts, passages, strict=True)
            ]
            computed = sum(context.computed for context in contexts)
            for context in contexts:
                self.engine.keep(context, KEEP)
        if lost := [one for one in passages if not self._complete(one)]:
            raise StoreError(
                f"{len(lost)} passages were read and left the disk at once",
                code="no_space",
                hint="free some space or raise kv_bytes, and index again: it goes on where it was",
            )
        measure = self._measure(keys)
        self.vectors.put(
            {one.name: measure.passage(key) for one, key in zip(passages, keys, strict=True) if one.tokens}
        )
        self.catalog.add(passages)
        return passages, computed

    def _measure(self, keys: Sequence[Tensor] = ()) -> Measure:
        """What this index compares keys by: fixed by the first passages that it was made of."""
        found = self.catalog.fact("measure")
        if found is None:
            questions = [self._asked(question) for question in QUESTIONS]
            with self._holding(questions, False) as contexts:
                first = len(self.before)
                asked = [unrotated(self.engine, one, first, len(one.ids) - first) for one in contexts]
            self.catalog.state({"measure": Measure.of(keys, asked).packed()})
            found = self.catalog.fact("measure")
        assert found is not None
        return Measure.unpacked(found, self._shape)

    def _check(self, name: str) -> None:
        """Refuse an index of another model or of passages that are cut or kept differently."""
        own = f"{self.engine.root} {self.passage_tokens} {KEEP} {self.before} {router_layers(self.engine)}"
        facts = {"made of": own.encode(), "model": name.encode(), "kv": self.store.folder.name.encode()}
        self.catalog.state(facts)
        if self.catalog.fact("made of") != facts["made of"]:
            made = (self.catalog.fact("model") or b"").decode()
            raise StoreError(
                f"the index {self.database.path} was made with another model or version ({made})",
                code="version",
                hint="agentctx index rm --all, and index again",
            )

    def _passages(self, document: Document) -> dict[str, int]:
        """The passages of a document, with their tokens."""
        chunks = split(document, self.passage_tokens, self.counter)
        found = ((document.text[one.span.start : one.span.end], one.tokens) for one in chunks)
        return {text: tokens for text, tokens in found if text.strip()}

    def _asked(self, question: str) -> list[int]:
        return [*self.before, *self.chat.template.encode_text(question.strip())]

    @contextmanager
    def _holding(self, texts: list[list[int]], keep: Keep = KEEP) -> Iterator[list[Context]]:
        """Contexts over these tokens, closed at the end."""
        contexts = self.engine.read_all(texts, keep=keep)
        try:
            yield contexts
        finally:
            for context in contexts:
                context.close()

    def _complete(self, passage: Passage) -> bool:
        return all(name in self.store for name in passage.blocks)

    def _bytes(self, passages: Iterable[Passage]) -> int:
        return self.store.size({name for one in passages for name in one.blocks})

    def _fitting(self, texts: Sequence[str], room: int) -> int:
        """How many of these texts certainly fit in so many bytes: as whole blocks, before any codec."""
        block, count = self.engine.body.shape.page_bytes + HEAD, 0
        for ids in self.reader.held_as(texts).values():
            room -= -(-len(ids) // PAGE_TOKENS) * block
            if room < 0:
                break
            count += 1
        return count

    def _full(self, left: int) -> StoreError:
        return StoreError(
            f"the KV of the indexed passages fills {FULL:.0%} of {self.store.shelf.budget:,} bytes: "
            f"{left:,} passages are not indexed",
            code="no_space",
            hint="raise kv_bytes (or unpin other paths) and index again: it goes on where it was",
        )

    def _told(self) -> list[str]:
        told, self.vectors.warnings = self.vectors.warnings, []
        return told


def folder_of(root: Path, model: Model) -> Path:
    """Where the index of a local model is, or would be, under `root`."""
    assert isinstance(model.chat, LocalChat)
    return root / model.chat.weights.engine.root[:16]


def usable(model: Model) -> bool:
    """Whether a model keeps what it reads, and can go on from pieces of it."""
    if not isinstance(model.chat, LocalChat):
        return False
    engine = model.chat.weights.engine
    plain = not isinstance(engine.pool, QuantisedPool) and None not in engine.body.rotations()
    return plain and engine.store is not None and engine.method.joins and not engine.method.evicts
