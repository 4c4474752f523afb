"""A model that reads: texts become keys and values once, and every later step starts from them.

Three places are asked in turn for what a text begins with: the pages in memory, the blocks on disk, the
model. Only what neither has is computed, and it goes to both. A sequence is a fork of what was read: it
shares the pages, and what it adds is its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError, ModelError, StoreError
from agentctx.memory.kv.chain import Block, blocks, root_after
from agentctx.memory.kv.choices import Choices
from agentctx.memory.kv.dtype import Keep, KVDtype
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.kv.prefixes import PrefixIndex
from agentctx.memory.kv.quantised import pool_of
from agentctx.memory.kv.store import BlockStore
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.body import Body, forward
from agentctx.runtime.context import Context
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.state import KVState

CHUNK = 512  # tokens of one forward pass while reading: what a cancelled read still finishes
ASKED = 128  # tokens at the end of a prompt that ask about the rest, where that makes a difference
TOGETHER = 4096  # tokens of several short texts in one pass, padding included; bounds its memory


class Engine:
    """One model and the KV of all that it has read. Safe for several threads: one pass at a time."""

    def __init__(
        self,
        body: Body,
        *,
        fingerprint: str,
        memory_bytes: int,
        method: Dense | None = None,
        store: BlockStore | None = None,
        chunk: int = CHUNK,
        kv_dtype: KVDtype = "auto",
    ) -> None:
        self.trained = body.window  # before a method scales it
        self.body, self.method = (method or Dense()).on(body)
        self._plain = self.body.plain()
        if self.method.evicts and kv_dtype in ("int8", "int4"):
            raise ConfigError(
                f"{self.method.name} keeps chosen tokens, which {kv_dtype} cannot hold",
                hint="leave kv_dtype out, or choose another attention method",
            )
        self.chunk = -(-chunk // self.method.grid) * self.method.grid
        self.pool = pool_of(self.body.shape, budget=memory_bytes, kv_dtype=kv_dtype)
        self.prefixes = PrefixIndex(self.pool)
        self.choices = Choices()
        self.store = store
        self.lock = threading.RLock()
        held = f" {kv_dtype}" if kv_dtype in ("int8", "int4") else ""
        self.root = root_after(fingerprint, self.method.writes + held)
        asked = "" if self.method == Dense() else repr(self.method)
        self.identity = root_after(fingerprint, asked + held)

    @property
    def window(self) -> int:
        """Tokens that a text may have: the model's window, or more if the attention method allows it."""
        return self.method.reach(self.body.window)

    def fits(self, tokens: int) -> None:
        """Raise ModelError (overflow) beyond the window."""
        if tokens > self.window:
            raise ModelError(
                f"{tokens:,} tokens exceed the model's window of {self.window:,}",
                code="overflow",
                hint="split the text, or choose a model with a larger window",
            )

    def read(
        self,
        ids: Sequence[int],
        *,
        keep: Keep = False,
        cancelled: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
        asked: Sequence[int] = (),
    ) -> Context:
        """Hold all of `ids`; with `keep`, on disk as well. Computes only what is held nowhere.

        `asked`: the only question that it is for, if the method is to know it.
        What is kept in fewer bits is known apart: no reading that was kept as it is begins with it.

        A cancelled read returns what it has; what it computed is not lost, and reading again continues there.
        `progress` is told the tokens held and wanted.
        """
        self.fits(len(ids))
        context = self._known(ids, self._named(ids, keep), keep)
        with _closed_if_it_fails([context]):
            self._continue(context, ids, keep, cancelled, progress)
            return self.method.reduce(context, len(ids), asked)

    def read_all(
        self,
        texts: Sequence[Sequence[int]],
        *,
        keep: Keep = False,
        cancelled: threading.Event | None = None,
    ) -> list[Context]:
        """Hold several texts. Short ones are computed together, as many as fill a pass; one after another
        else.

        A cancelled call returns contexts that may lack tokens, as `read` does.
        """
        found: list[Context] = []
        fresh: list[int] = []  # texts of which nothing is held, and that one pass can take whole
        with _closed_if_it_fails(found):
            for index, ids in enumerate(texts):
                self.fits(len(ids))
                found.append(context := self._known(ids, self._named(ids, keep), keep))
                if not context.ids and len(ids) <= CHUNK:
                    fresh.append(index)
                else:
                    self._continue(context, ids, keep, cancelled)
            fresh.sort(key=lambda index: len(texts[index]))
            while fresh and not (cancelled is not None and cancelled.is_set()):
                rows = max(1, TOGETHER // max(1, len(texts[fresh[-1]])))
                batch, fresh = fresh[-rows:], fresh[:-rows]
                self._read_together(
                    [found[index] for index in batch], [texts[index] for index in batch], keep
                )
            for index, ids in enumerate(texts):
                found[index] = self.method.reduce(found[index], len(ids))
        return found

    def begin(
        self, ids: Sequence[int], *, keep: Keep = False, cancelled: threading.Event | None = None
    ) -> tuple[Context, Tensor | None]:
        """Hold a prompt; returns it with the hidden state of its last token, which is always computed.

        With `keep`, its full blocks go to the disk; the open one at its end is no beginning of other prompts.
        Under a method that changes what is stored or asked, the end of the prompt asks and the rest is read.
        """
        self.fits(len(ids))
        grid = self.method.grid
        apart = self.method.writes or self.method.evicts
        read = max(0, len(ids) - ASKED) // grid * grid if apart else len(ids)
        named = self._named(ids[:read], keep)
        if named and named[-1].end % PAGE_TOKENS:
            named.pop()
        context = self._known(ids[:-1], named, keep)
        with _closed_if_it_fails(held := [context]):
            at = len(context.ids)
            hidden = context.feed(ids[at:read], cancelled=cancelled)
            self._remember(context, named, at, keep)
            context.state.reading = False
            if read < len(ids):
                context = held[0] = self.method.reduce(context, read)
                hidden = context.feed(ids[read:], cancelled=cancelled)
        return context, hidden

    def kept(self, ids: Sequence[int], keep: Keep = True) -> list[str]:
        """The names of the blocks on disk that `ids`, read with `keep`, are or would be kept in."""
        return [block.name for block in self._named(ids, keep)]

    def keep(self, context: Context, keep: Keep) -> None:
        """Write what is missing on disk of a text that was read with `keep`: it may have been in memory only.

        Raises StoreError (no_space, unwritable).
        """
        for block in self._named(context.ids, keep):
            self._put(context, block, keep)

    def name(
        self, ids: Sequence[int], documents: Collection[str], keep: Keep = True, *, first: int = 0
    ) -> None:
        """Write down whose text it is what is kept on disk of `ids` from token `first` on."""
        if self.store is not None and documents:
            named = [block.name for block in self._named(ids, keep) if block.end > first]
            self.store.own(named, documents)

    def step(
        self, contexts: Sequence[Context], ids: Tensor, pads: Sequence[int] = (), *, spoken: bool = False
    ) -> Tensor:
        """One forward pass over `ids [B, T]`, row b after context b; returns hidden states `[B, T, H]`.

        `pads`: for each row, how many columns on the left are padding; only where nothing is in the table.
        `spoken`: these are tokens of an answer, which may go through weights of fewer bits. What is read or
        asked never does: how many rows a pass has depends on what was held before, and must not matter.
        A pass that fails leaves the contexts as they were.
        """
        body = self.body if spoken else self._plain
        with self.lock, torch.inference_mode():
            if len(contexts) == 1 and not pads:
                return forward(body, ids, contexts[0].state)
            tables = [context.table for context in contexts]
            padding = pads or [0] * len(tables)
            shifts = [table.tokens - pad for table, pad in zip(tables, padding, strict=True)]
            first, notes = contexts[0].state, [context.state.notes[0] for context in contexts]
            pasts = [context.state.pasts[0] for context in contexts]
            state = KVState(self.pool, tables, first.method, shifts, 0, first.reading, notes, pasts)
            hidden = forward(body, ids, state)
            for context in contexts:
                context.state.settle()
            return hidden

    def logits(self, hidden: Tensor, *, spoken: bool = False) -> Tensor:
        """float32 `[..., V]`; `spoken`: to choose the next token of an answer, as in `step`."""
        with self.lock, torch.inference_mode():
            return (self.body if spoken else self._plain).logits(hidden).float()

    def _continue(
        self,
        context: Context,
        ids: Sequence[int],
        keep: Keep,
        cancelled: threading.Event | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read on where `context` ends."""
        named = self._named(ids, keep)
        while (at := len(context.ids)) < len(ids):
            if context.feed(ids[at : at + self.chunk], cancelled=cancelled) is None:
                break
            self._remember(context, named, at, keep)
            if progress:
                progress(len(context.ids), len(ids))
        context.state.reading = False  # also of a part: what comes next asks

    def _read_together(self, contexts: list[Context], texts: list[Sequence[int]], keep: Keep) -> None:
        """One pass over whole texts, padded on the left."""
        width = max(map(len, texts))
        pads = [width - len(ids) for ids in texts]
        padded = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(pads, texts, strict=True)])
        self.step(contexts, padded, pads)
        for context, ids in zip(contexts, texts, strict=True):
            context.ids[:] = ids
            context.state.reading = False
            context.computed = len(ids)
            self._remember(context, self._named(ids, keep), 0, keep)

    def _named(self, ids: Sequence[int], keep: Keep) -> list[Block]:
        root = root_after(self.root, keep if isinstance(keep, str) else "")
        return list(blocks(ids, root, self.method.grid))

    def _known(self, ids: Sequence[int], named: Sequence[Block], keep: Keep) -> Context:
        """What is held of the beginning of `ids`, in memory or on disk; with `keep`, then on disk as well."""
        warnings: list[str] = []
        with self.lock:
            table, held = BlockTable(self.pool), 0
            try:
                for block in named:
                    if block.end > len(ids):
                        break
                    page = self.prefixes.get(block.name)
                    if page is None:
                        page = self._load(block, warnings)
                    if page is None:
                        break
                    table.append(page, block.end)
                    held = block.end
            except BaseException:
                table.close()
                raise
            if held < len(ids) and held % self.method.grid:
                held -= held % self.method.grid
                table.crop(held)
            self._used([block.name for block in named if block.end <= held])
            state = KVState(self.pool, [table], self.method, [held], reading=True)
            context = Context(self, state, list(ids[:held]), reused=held, warnings=warnings)
        self._keep_blocks(context, [block for block in named if block.end <= held], keep)
        return context

    def _load(self, block: Block, warnings: list[str]) -> int | None:
        """A page with a block from the disk; the index holds it."""
        if self.store is None:
            return None
        try:
            found = self.store.get(block.name, self.body.shape.dtype)
        except StoreError as error:
            if error.code != "corrupt":
                raise
            warnings.append(f"{error.message}; it is computed again")
            return None
        if found is None:
            return None
        (page,) = self.pool.take(1)
        self.pool.write(page, *found)
        if block.end - block.start == PAGE_TOKENS:
            self.pool.filled([page])
        self.prefixes.add([block], [page])
        self.pool.release([page])
        return page

    def _remember(self, context: Context, named: Sequence[Block], before: int, keep: Keep) -> None:
        """Index the blocks that were computed after the first `before` tokens; with `keep`, write them."""
        held = [block for block in named if block.end <= len(context.ids)]
        fresh = [block for block in held if block.end > before]
        with self.lock:
            pages = [context.table.pages[block.start // PAGE_TOKENS] for block in fresh]
            self.prefixes.add(fresh, pages)
            self._keep_blocks(context, fresh, keep)
            self.pool.filled(context.table.pages[: len(context.ids) // PAGE_TOKENS])
            self._used([block.name for block in held])

    def _keep_blocks(self, context: Context, wanted: Sequence[Block], keep: Keep) -> None:
        """With `keep`, write what is not on disk of these blocks. The answer does not depend on it: an error
        is a warning.
        """
        try:
            for block in wanted if keep else ():
                self._put(context, block, keep)
        except StoreError as error:
            said = f"{error.message}; the text will be read again next time"
            if said not in context.warnings:
                context.warnings.append(said)

    def _put(self, context: Context, block: Block, keep: Keep) -> None:
        if self.store is not None and block.name not in self.store:
            with self.lock:
                page = context.table.pages[block.start // PAGE_TOKENS]
                k, v = self.pool.read(page, block.end - block.start)
            self.store.put(block.name, k, v, keep if isinstance(keep, str) else None)

    def _used(self, names: Sequence[str]) -> None:
        self.prefixes.used(names)
        if self.store is not None:
            self.store.used(names)


@contextmanager
def _closed_if_it_fails(contexts: list[Context]) -> Iterator[None]:
    """Who gets an error gets no context to close."""
    try:
        yield
    except BaseException:
        for context in contexts:
            context.close()
        raise
