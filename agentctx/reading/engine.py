"""A local model that reads a text once and answers from it as often as asked.

    from agentctx import Engine
    engine = Engine.load("smollm2")
    with engine.read(text) as reading:
        print(reading.ask("Which court ruled?").text)

The keys and values of what is read stay in memory while there is room, and on disk: another process that
reads the same text, or one that begins alike, computes only what is new.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from langchain_core.messages import BaseMessage

from agentctx.memory.blobs import Blobs
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.offsets import Offsets
from agentctx.memory.types import Document
from agentctx.models.failures import memory_errors
from agentctx.models.load import ENDPOINT, open_model
from agentctx.models.reader import LikelihoodReader
from agentctx.models.template import ChatTemplate
from agentctx.models.weights import Weights
from agentctx.paths import KV_BYTES, Paths
from agentctx.reading.frame import Frame, chat_frame, own_frame
from agentctx.reading.reading import Reading
from agentctx.reading.records import Basis, Window
from agentctx.reading.request import Place, question_hash
from agentctx.reading.sources import Source, gathered
from agentctx.reading.texts import Text, document_of
from agentctx.reading.tokens import Tokens
from agentctx.secret import SIZE, kept_secret
from agentctx.workflows.fence import draw_tag

if TYPE_CHECKING:
    from agentctx.memory.kv.dtype import KVDtype
    from agentctx.models.fetch import Progress
    from agentctx.models.table import Linears

ASSUMED = 4096  # tokens that a model is taken to read well at most, where nobody has measured it


class Engine:
    """One model, its KV memory, and the store of what it has read."""

    def __init__(
        self,
        weights: Weights,
        *,
        secret: bytes | None = None,
        reliable: int | None = None,
        archive: Blobs | None = None,
    ) -> None:
        """`secret`: what delimiters are made of, drawn if there is none; texts that are to be reopened by
        another process need the same. `reliable`: tokens that the model reads well, if the caller knows
        better than calibration and table. `archive`: where what a scope drops is kept, in memory if there is
        none.
        """
        self.weights = weights
        self.runtime = weights.engine
        self.tokens = Tokens(weights.tokenizer)
        self._template = ChatTemplate(weights.tokenizer) if weights.tokenizer.chat_template else None
        self._secret = secret or secrets.token_bytes(SIZE)
        self._reliable = reliable
        self.archive = archive

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = "smollm2",
        *,
        attention: str = "auto",
        linears: Linears = "auto",
        kv_dtype: KVDtype = "auto",
        memory_bytes: int | None = None,
        kv_bytes: int = KV_BYTES,
        paths: Paths | None = None,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> Engine:
        """Load `smollm2`, a folder of safetensors, a .gguf file or a hub id.

        `attention`: `NAME` or `NAME:key=value,...`; `linears`: "bf16", "int4" or "auto"; `kv_dtype`: how KV
        is held in memory, "int8" and "int4" in less of it. `memory_bytes` bounds weights and KV in memory
        (None: 60 % of what is free), `kv_bytes` the KV on disk, in `paths` or this user's folders; 0 writes
        nothing. `offline` forbids downloads. Raises ConfigError and ModelError as `models.load.open_model`
        does; ModelError (unsupported) for an endpoint.
        """
        from agentctx.models.local import LocalChat

        name, paths = os.fspath(source), paths or Paths.default()
        if name.startswith(ENDPOINT):
            raise ModelError(
                f"{name} is an endpoint: what it has read is out of reach",
                code="unsupported",
                hint="name a local model, or use Context",
            )
        model = open_model(
            name,
            paths=paths,
            offline=offline,
            attention=attention,
            linears=linears,
            kv_dtype=kv_dtype,
            kv_bytes=kv_bytes,
            memory_bytes=memory_bytes,
            progress=progress,
        )
        assert isinstance(model.chat, LocalChat), model.chat
        if not kv_bytes:
            return cls(model.chat.weights)
        return cls(model.chat.weights, secret=kept_secret(paths.secret), archive=Blobs(paths.blobs))

    @property
    def window(self) -> Window:
        """How much the model takes, and how much of that it reads well. Plan with `reliable`."""
        trained, context = self.runtime.trained, self.weights.context
        memory = self.runtime.pool.capacity * PAGE_TOKENS
        reliable, method = self._known_reliable()
        return Window(trained, context, min(context, reliable), memory, method)

    @property
    def reader(self) -> LikelihoodReader:
        """What scores texts without generating."""
        return LikelihoodReader(self.runtime, self.weights.tokenizer, self.weights.calibration)

    def count(self, text: str | Sequence[BaseMessage]) -> int:
        """Tokens of a text, or of a finished prompt of messages with the chat template around them."""
        if isinstance(text, str):
            return len(self.tokens.data(text).ids)
        return len(self._chat().encode(text))

    def read(
        self,
        source: Document | str | Sequence[int],
        *,
        prefix: str | None = None,
        question: str | None = None,
        keep: bool = True,
        cancel: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Reading:
        """Hold a text, computing what is held neither in memory nor on disk; with `keep`, on disk as well.

        A text is read as data, in a turn of the chat template and between delimiters. `prefix` takes the
        place of all that stands before it, control tokens and all: "" reads the bare text, for `generate`;
        for `ask` it must open the turn. Token ids are read as they are, after `prefix` if there is one.

        `question`: the only one that it is for, which an attention method that is `query_aware` then has in
        view when it decides what to keep of the text; another is refused, unless forced. It changes nothing
        that is kept on disk, and nothing at all under other methods.

        `cancel` is looked at between pieces of 512 tokens: then the reading is not complete, and reading the
        same again goes on there. `progress` is told the tokens held and wanted. Raises ModelError: overflow
        beyond the window, out_of_memory; InputError for a text that is not Unicode; StoreError.
        """
        if isinstance(source, str | Document):
            source = document_of(source) if isinstance(source, str) else source
            frame = self._framed(source) if prefix is None else own_frame(self._template, prefix)
            ids, offsets = self.tokens.data(source.text)
            before = ([] if prefix is None else self.tokens.opening) + self.tokens.prompt(frame.before)
            text = Text(source, offsets, len(before))
        else:
            frame = own_frame(self._template, prefix or "")
            ids, before = list(source), self.tokens.prompt(frame.before)
            text = Text(None, Offsets([(0, 0)] * len(ids), 0), len(before))
        wanted = before + ids
        try:
            with memory_errors(self.weights.name):
                context = self.runtime.read(
                    wanted,
                    keep=keep,
                    cancelled=cancel,
                    progress=progress,
                    asked=frame.question(self.tokens, question) if question else (),
                )
        finally:  # what was read until then is kept
            if keep and text.document:
                self.runtime.name(wanted, (text.document.source,), first=text.first)
        chosen = self.runtime.method.query_aware and context.state.pasts[0] is not None
        served = question_hash(question) if question and chosen else None
        return Reading(self, context, wanted, (text,), frame, keep=keep, question=served)

    def compose(
        self,
        readings: Sequence[Reading | tuple[Reading, Sequence[Place]]],
        *,
        order: Literal["sequence", "set"] = "sequence",
    ) -> Reading:
        """Several readings, or these places of them, as one: what stands before the texts once, then each.

        Nothing is computed but the places of keys. "sequence": one text after the other; "set": all at the
        same places, so that their order does not matter (Set-Based Prompting, arXiv 2406.06581). The texts
        did not see one another when they were read, which costs quality; `reread=True` when asking computes
        them in one piece. Raises ConfigError for readings with different beginnings, ModelError: unsupported
        for a model whose keys cannot be moved, out_of_memory, overflow beyond the window.
        """
        pairs = [one if isinstance(one, tuple) else (one, None) for one in readings]
        if not pairs:
            raise ConfigError("there is nothing to compose")
        first = pairs[0][0]
        before = first.tokens()[: first.texts[0].first]
        sources: list[Source] = []
        texts: list[Text] = []
        at = end = len(before)
        try:
            for reading, places in pairs:
                if reading.tokens()[: reading.texts[0].first] != before:
                    raise ConfigError(
                        "the readings begin differently, so no beginning serves them all",
                        hint="read them with the same prefix=",
                    )
                place = sum(len(source.kept) for source in sources)
                texts += [replace(text, first=place + text.first) for text in reading.texts]
                sources.append(source := reading.part(places, at, opening=not sources))
                used = int(source.kept[len(before) :].sum())
                end = max(end, at + used)
                at += used if order == "sequence" else 0
            ids = [token for reading, _ in pairs for token in reading.tokens()]
            kept = torch.cat([source.kept for source in sources]).tolist()
            held = [token for token, used in zip(ids, kept, strict=True) if used]
            self.runtime.fits(len(held))
            with memory_errors(self.weights.name):
                context = gathered(self.runtime, sources, held, end)
        except BaseException:
            for source in sources:
                source.close(self.runtime)
            raise
        return Reading(self, context, ids, tuple(texts), first.frame, sources=sources)

    def _known_reliable(self) -> tuple[int, Basis]:
        """Tokens that the model reads well, and who says so."""
        calibration, entry = self.weights.calibration, self.weights.entry
        if self._reliable:
            return self._reliable, "configured"
        if calibration and calibration.reliable:
            return calibration.reliable, "calibrated"
        if entry and entry.reliable:
            return entry.reliable, "table"
        return ASSUMED, "assumed"

    def _framed(self, document: Document) -> Frame:
        if self._template is None:
            return own_frame(None, "")
        return chat_frame(self._template, draw_tag([document], self._secret))

    def _chat(self) -> ChatTemplate:
        return self._template or ChatTemplate(self.weights.tokenizer)  # which raises
