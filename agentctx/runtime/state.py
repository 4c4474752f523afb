"""The keys and values of a batch while a model runs: what every layer of a forward pass writes to and reads.

A step begins when the first layer meets new tokens: room for all layers is reserved then, before anything
is computed, so a step that does not fit fails whole. Rows may have different lengths: an integer for each
says at which position its columns begin. It is negative for padding on the left, which is never stored.

A row may begin with a past of chosen tokens instead of nothing (`memory.kv.past`): every new token sees all
of it, and its table holds what came after. Rows with one past attend to it as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentctx.kernels.merge import merge_lse
from agentctx.kernels.records import Attention
from agentctx.kernels.store import write_kv
from agentctx.memory.errors import ModelError
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.table import BlockTable, stacked
from agentctx.runtime.layer import DECODE_TOKENS, LayerKV, Scoring, attend_past
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.notes import Notes


@dataclass
class KVState:
    """`tables`, one for each row; `length`, the columns fed so far; column c of row b is at `c +
    shifts[b]`. `reading`: the tokens to come are a text to be read (else they ask or answer); None judges by
    their number, for callers that do not say. `pasts`: what comes before the table of each row, if anything.
    """

    pool: PagePool
    tables: list[BlockTable]
    method: Dense
    shifts: list[int]
    length: int = 0
    reading: bool | None = None
    notes: list[Notes] = field(default_factory=list)  # of each row
    pasts: list[Past | None] = field(default_factory=list)  # of each row
    layer_lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.layer_lengths = [self.length] * self.pool.shape.layers
        self.notes = self.notes or [Notes() for _ in self.tables]
        self.pasts = self.pasts or [None for _ in self.tables]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Attention:
        """Store k and v `[B, Hkv, T, D]` of a layer, and answer q `[B, Hq, T, D]` from all that is stored."""
        new = q.shape[2]
        if self.layer_lengths[layer] == self.length:
            self._open(new)
        self.layer_lengths[layer] += new
        self._write(layer, k, v)
        view = LayerKV(
            layer,
            self.pool.layers[layer],
            self._table,
            self._lens,
            self._longest,
            scoring,
            new > DECODE_TOKENS if self.reading is None else self.reading,
            self.notes,
            self.pool.shape.layers,
        )
        before = self._before(layer, q, scoring) if any(self.pasts) else None
        found = self.method.attend(q, view) if scoring.window is None else view.exact(q)
        return found if before is None else merge_lse([before, found])

    def settle(self) -> None:
        """Go on from where the tables end: others may have appended to them."""
        self.shifts = [table.tokens - self.length for table in self.tables]

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` columns, int64 `[B, new]`; 0 for padding."""
        starts = torch.tensor([self.length + shift for shift in self.shifts], device=self.pool.shape.device)
        fed = (starts[:, None] + torch.arange(new, device=starts.device)).clamp_min(0)
        return fed + torch.tensor([[past.end if past else 0] for past in self.pasts], device=fed.device)

    def crop(self, remove: int) -> None:
        """Forget the last `remove` columns of every row; ModelError (unsupported) for tokens of a past."""
        for past, table in zip(self.pasts, self.tables, strict=True):
            if past and remove > table.tokens:
                raise ModelError(
                    f"{remove} tokens are to be forgotten, {table.tokens} came after the chosen ones",
                    code="unsupported",
                    hint="go back to the full reading",
                )
        self.length -= remove
        self.layer_lengths = [self.length] * len(self.layer_lengths)
        for table, shift, notes in zip(self.tables, self.shifts, self.notes, strict=True):
            table.crop(max(0, self.length + shift))
            notes.crop(table.tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Replace the batch by these of its rows, some perhaps more than once; nothing is copied."""
        tables, pasts = self.tables, self.pasts
        self.tables = [tables[row].fork() for row in rows]
        self.pasts = [_shared(pasts[row]) for row in rows]
        self.shifts = [self.shifts[row] for row in rows]
        self.notes = [self.notes[row].copy() for row in rows]
        _close(tables, pasts)

    def fork(self) -> KVState:
        """A second batch with the same past, whose pages it shares."""
        return KVState(
            self.pool,
            [table.fork() for table in self.tables],
            self.method,
            list(self.shifts),
            self.length,
            self.reading,
            [notes.copy() for notes in self.notes],
            [_shared(past) for past in self.pasts],
        )

    def close(self) -> None:
        pasts, self.pasts = self.pasts, [None for _ in self.tables]
        _close(self.tables, pasts)

    def _before(self, layer: int, q: Tensor, scoring: Scoring) -> Attention:
        """Attention to the pasts of the rows; those that share one attend to it together."""
        if scoring.window is not None or self.method.moves:
            what = "a layer with a window" if scoring.window is not None else f"the method {self.method.name}"
            raise ModelError(
                f"{what} does not go with chosen tokens (an evicted, narrowed or composed reading)",
                code="unsupported",
                hint="ask the full reading, with another attention method if need be",
            )
        tiles, first = self.pool.tiles, self.pasts[0]
        if first and all(past is first for past in self.pasts):
            return attend_past(q, tiles, first.tiles[layer], first.lens[layer], first.longest, scoring)
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=q.device)
        for past in {id(past): past for past in self.pasts if past}.values():
            rows = [row for row, other in enumerate(self.pasts) if other is past]
            found = attend_past(q[rows], tiles, past.tiles[layer], past.lens[layer], past.longest, scoring)
            out[rows], lse[rows] = found
        return Attention(out, lse)

    def _open(self, new: int) -> None:
        """Reserve room for `new` columns and set what all layers of this step share."""
        after = [max(0, self.length + new + shift) for shift in self.shifts]
        for table, tokens in zip(self.tables, after, strict=True):
            table.reserve(tokens)
        for table, tokens in zip(self.tables, after, strict=True):
            table.tokens = tokens
        device = self.pool.shape.device
        self._starts = [self.length + shift for shift in self.shifts]
        self._start = torch.tensor(self._starts, dtype=torch.int32, device=device)
        self._lens = torch.tensor(after, dtype=torch.int32, device=device)
        self._longest = max(after)
        self._table = stacked(self.tables).to(device)
        self.length += new

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        pages = self.pool.layers[layer]
        if min(self._starts) >= 0:
            write_kv(pages, k, v, self._table, self._start)
            return
        for row, start in enumerate(self._starts):
            skip = max(0, -start)
            if skip < k.shape[2]:
                one = slice(row, row + 1)
                at = self._start[one] + skip
                write_kv(pages, k[one, :, skip:], v[one, :, skip:], self._table[one], at)


def _shared(past: Past | None) -> Past | None:
    return past.share() if past else None


def _close(tables: Sequence[BlockTable], pasts: Sequence[Past | None]) -> None:
    for table, past in zip(tables, pasts, strict=True):
        table.close()
        if past:
            past.close()
