"""Making a past out of others: which tokens of each are kept, and where their keys stand now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.memory.kv.past import Past
from agentctx.memory.kv.pool import PAGE_TOKENS

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys [1, 1, n, D] from positions [n] to positions [n]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Tokens of a past: `kept` bool, `[N]` the same in all layers and heads or `[layers, Hkv, N]`; N is
    `past.longest`. With `old` and `new`, int64 of either shape, keys are turned from one position to the
    other.
    """

    past: Past
    kept: Tensor
    old: Tensor | None = None
    new: Tensor | None = None

    def whole(self) -> Tensor:
        """Blocks, bool `[NT]`, that are kept as they are in all layers and heads: they can be shared."""
        past, blocks = self.past, self.past.tiles.shape[2]
        if self.kept.dim() > 1 or self.new is not None or bool((past.lens != past.longest).any()):
            return torch.zeros(blocks, dtype=torch.bool)
        room = blocks * PAGE_TOKENS - past.longest
        return F.pad(self.kept.cpu(), (0, room)).view(-1, PAGE_TOKENS).all(1)

    def rest(self) -> Tensor:
        """The other tokens that are kept, bool `[layers, Hkv, N]`."""
        tokens = torch.arange(self.past.longest)
        held = (tokens < self.past.lens.cpu()[..., None]) & ~self.whole().repeat_interleave(PAGE_TOKENS)[
            tokens
        ]
        return self.kept.cpu() & held

    def picked(self, layer: int, rest: Tensor, turn: Turn | None) -> list[tuple[Tensor, Tensor]]:
        """K and V `[n, D]` of the tokens `rest [Hkv, N]` of each head of a layer."""
        keys, values = self.past.read(layer)
        found = []
        for head, mask in enumerate(rest):
            index = mask.nonzero()[:, 0].to(keys.device)
            k, v = keys[head, index], values[head, index]
            if turn is not None and self.old is not None and self.new is not None:
                shape = (*self.past.lens.shape, self.past.longest)
                old, new = (
                    x.to(index.device).expand(shape)[layer, head, index] for x in (self.old, self.new)
                )
                k = turn(k[None, None], old, new)[0, 0]
            found.append((k, v))
        return found


def gather(parts: Sequence[Part], *, end: int, turns: Sequence[Turn] = ()) -> Past:
    """One past of what is kept of several, in one pool; the next token stands at position `end`.

    Blocks that are kept whole are shared, all else is copied into new pages. `turns`, one for each layer,
    move the keys of parts that have positions.

    Raises ModelError (out_of_memory) before anything is copied, ValueError for a mask that does not fit.
    """
    for part in parts:
        if part.kept.dtype != torch.bool or part.kept.shape[-1] != part.past.longest:
            came = f"{part.kept.dtype} {list(part.kept.shape)}"
            raise ValueError(f"kept is {came}: bool over {part.past.longest} tokens is needed")
        if part.new is not None and not turns:
            raise ValueError("parts have positions: turns are needed, one for each layer")
    pool = parts[0].past.pool
    shape = pool.shape
    heads = shape.layers * shape.kv_heads
    rest = [part.rest() for part in parts]
    lens = torch.stack([mask.sum(-1) for mask in rest]).sum(0)
    counts = -(-lens // PAGE_TOKENS)
    shared = torch.cat([part.past.tiles.cpu()[..., part.whole()] for part in parts], -1)
    pages = pool.take(-(-int(counts.sum()) // heads))
    own = _dealt(pages, counts, heads)
    try:
        for layer in range(shape.layers):
            turn = turns[layer] if turns else None
            some = [
                part.picked(layer, mask[layer], turn)
                for part, mask in zip(parts, rest, strict=True)
                if bool(mask[layer].any())
            ]
            for head, count in enumerate(counts[layer].tolist()):
                if count:
                    k, v = (torch.cat(x) for x in zip(*(one[head] for one in some), strict=True))
                    pool.fill(own[layer, head, :count].to(shape.device), k, v)
    except BaseException:
        pool.release(pages)
        raise
    others = sorted(set((shared.flatten() // heads).tolist()))
    pool.share(others)
    lens = (lens + shared.shape[2] * PAGE_TOKENS).to(torch.int32)
    tiles = torch.cat([shared, own], -1)[..., : max(1, shared.shape[2] + int(counts.max()))].contiguous()
    place, longest = shape.device, int(lens.max())
    same = all(part.kept.dim() == 1 and part.past.same for part in parts)
    return Past(pool, tiles.to(place), lens.to(place), end, (*pages, *others), longest, same)


def slots(parts: Sequence[Part]) -> Tensor:
    """Which token each place of `gather(parts)` holds, int64, counted over the tokens of all parts in turn.

    For parts whose heads keep the same tokens.
    """
    whole, rest, at = [], [], 0
    for part in parts:
        shared = part.whole().repeat_interleave(PAGE_TOKENS)[: part.past.longest]
        index = torch.arange(at, at + part.past.longest)
        whole.append(index[shared])
        rest.append(index[part.kept.cpu() & ~shared])
        at += part.past.longest
    return torch.cat([*whole, *rest])


def _dealt(pages: Sequence[int], counts: Tensor, heads: int) -> Tensor:
    """The tiles of `pages`, `counts [layers, Hkv]` to each head: int32 `[layers, Hkv, NT]`."""
    tiles = torch.tensor([*pages, 0], dtype=torch.int32)[:, None] * heads + torch.arange(
        heads, dtype=torch.int32
    )
    dealt = torch.zeros(*counts.shape, max(1, int(counts.max())), dtype=torch.int32)
    used = torch.arange(dealt.shape[-1]) < counts[..., None]
    dealt[used] = tiles.flatten()[: int(used.sum())]
    return dealt
