"""What `validate=True` checks: the contents of tables and lists. It reads them, so a GPU has to finish
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSelection


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def table(block_table: Tensor, lens: Tensor, page_tokens: int, n_pages: int) -> None:
    """Raise IndexError for the first used entry of `block_table [B, NB]` that is no page of the pool.

    Raises IndexError as well for a length below 0, or one that needs more blocks than the table has.
    """
    used = (lens.long() + page_tokens - 1) // page_tokens
    if bool((bad := (lens < 0) | (used > block_table.shape[1])).any()):
        (i,) = _first(bad)
        raise IndexError(
            f"context_lens[{i}] is {int(lens[i])}: 0 to {block_table.shape[1] * page_tokens} fits the table"
        )
    slots = torch.arange(block_table.shape[1], device=block_table.device)
    wrong = (block_table < 0) | (block_table >= n_pages)
    if bool((bad := wrong & (slots < used[:, None])).any()):
        at = _first(bad)
        raise IndexError(f"block_table{list(at)} is {int(block_table[at])}: the pool has {n_pages} pages")


def selection(chosen: BlockSelection, n_pages: int, n_blocks: Tensor | None = None) -> None:
    """Raise IndexError for the first count above S, page outside the pool, or list out of order.

    `n_blocks` (broadcast to `chosen.counts`) bounds the logical ids: they must be smaller.
    """
    slots = chosen.pages.shape[-1]
    counts("selection.counts", chosen.counts, slots)
    live = torch.arange(slots, device=chosen.pages.device) < chosen.counts[..., None]
    if bool((bad := live & ((chosen.pages < 0) | (chosen.pages >= n_pages))).any()):
        at = _first(bad)
        raise IndexError(
            f"selection.pages{list(at)} is {int(chosen.pages[at])}: the pool has {n_pages} pages"
        )
    if bool((bad := live[..., 1:] & (chosen.blocks[..., 1:] <= chosen.blocks[..., :-1])).any()):
        at = _first(bad)
        raise IndexError(f"selection.blocks{list(at)} does not ascend: lists must be ascending and unique")
    limit = chosen.blocks >= 2**31 - 1 if n_blocks is None else chosen.blocks >= n_blocks[..., None]
    if bool((bad := live & ((chosen.blocks < 0) | limit)).any()):
        at = _first(bad)
        raise IndexError(f"selection.blocks{list(at)} is {int(chosen.blocks[at])}: no such block")


def counts(name: str, values: Tensor, slots: int) -> None:
    """Raise IndexError for the first count outside 0 to `slots`."""
    if bool((bad := (values < 0) | (values > slots)).any()):
        at = _first(bad)
        raise IndexError(f"{name}{list(at)} is {int(values[at])}: 0 to {slots} is needed")


def room(name: str, start: Tensor, added: int, tokens: int) -> None:
    """Raise IndexError for the first sequence that `added` tokens from `start` on take beyond `tokens`."""
    if bool((bad := start + added > tokens).any()):
        (i,) = _first(bad)
        raise IndexError(f"{name}[{i}] is {int(start[i])}: {added} more tokens, and room for {tokens}")


def no_nan(name: str, values: Tensor) -> None:
    """Raise IndexError at the first NaN."""
    if bool((bad := values.isnan()).any()):
        raise IndexError(f"{name}{list(_first(bad))} is NaN")
