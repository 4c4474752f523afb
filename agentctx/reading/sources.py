"""The tokens that a reading is made of, and readings made of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.gather import Part, Turn, gather, slots
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine as Runtime


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What was read in one go: `past` holds its N tokens in order, `kept` bool `[N]` are those used here, at
    the positions `new` int64 `[N]`; None: where they were. Who has one closes it.
    """

    past: Past
    kept: Tensor
    new: Tensor | None = None

    @classmethod
    def of(cls, runtime: Runtime, table: BlockTable, first: int = 0) -> Source:
        """All that a table holds from token `first` on."""
        with runtime.lock:
            return cls(Past.over(table), torch.arange(table.tokens) >= first)

    def share(self, runtime: Runtime) -> Source:
        """The same for one more holder."""
        with runtime.lock:
            self.past.share()
        return self

    def close(self, runtime: Runtime) -> None:
        with runtime.lock:
            self.past.close()


def refuse_chosen(context: Context, sources: Sequence[Source]) -> None:
    """Raise ModelError (unsupported) for a reading whose tokens an evictor chose: they are not its text's."""
    if context.state.pasts[0] and not sources:
        raise ModelError(
            "an evicted reading cannot be narrowed or composed",
            code="unsupported",
            hint="ask with reread=True, or read under a method that keeps every token",
        )


def gathered(
    runtime: Runtime, sources: Sequence[Source], ids: Sequence[int], end: int, seen: Tensor | None = None
) -> Context:
    """A context over the kept tokens of `sources` that are `seen`, bool over all their tokens in turn.

    The next token stands at position `end`; `ids` are the tokens that count for the window. Raises
    ModelError: out_of_memory, unsupported where keys must move and the model's rotations are not known.
    """
    parts = _parts(sources, seen)
    turns = _turns(runtime) if any(source.new is not None for source in sources) else ()
    with runtime.lock:
        return Context.over(runtime, gather(parts, end=end, turns=turns), ids)


def places(sources: Sequence[Source]) -> Tensor:
    """Which of all the tokens of `sources` in turn stands at each place of what was `gathered`, int64."""
    return slots(_parts(sources))


def _parts(sources: Sequence[Source], seen: Tensor | None = None) -> list[Part]:
    parts, at = [], 0
    for source in sources:
        size = len(source.kept)
        kept = source.kept if seen is None else source.kept & seen[at : at + size]
        old = None if source.new is None else torch.arange(size)
        parts.append(Part(source.past, kept, old, source.new))
        at += size
    return parts


def moved(context: Context, start: int, stay: Sequence[int]) -> None:
    """Of the tokens of a context from `start` on, leave those that `stay`, one after the other from there.

    Their keys are turned to the new positions, their values are what they were. Raises ModelError:
    out_of_memory, unsupported where a rotation is not known or tokens before the context's own are meant.
    """
    runtime, table = context.engine, context.table
    first = len(context.ids) - table.tokens
    if not stay or start < first:
        context.crop(start)  # which raises for what is not in the table
        return
    ids = [context.ids[at] for at in stay]
    past = context.state.pasts[0]
    position = past.end if past else 0
    with runtime.lock, torch.inference_mode():
        turns = _turns(runtime)
        k, v = table.read(start - first)
        index = torch.tensor(stay, device=k.device) - start
        old = index + start - first + position
        new = torch.arange(len(stay), device=k.device) + start - first + position
        context.crop(start)
        keys = zip(turns, k[:, :, index], strict=True)
        table.extend(torch.stack([turn(one[None], old, new)[0] for turn, one in keys]), v[:, :, index])
        context.state.settle()
        context.ids += ids


def appended(context: Context, table: BlockTable, chosen: range) -> tuple[Tensor, Tensor]:
    """Go on with what `table` holds of the tokens `chosen`, as if they stood next; the caller adds their ids.

    Their keys are turned to where they stand now, their values are what they were: both are returned,
    `[layers, Hkv, n, D]`. Raises ModelError: out_of_memory, unsupported where a rotation is not known.
    """
    runtime, past = context.engine, context.state.pasts[0]
    with runtime.lock, torch.inference_mode():
        turns = _turns(runtime)
        k, v = (x[:, :, : len(chosen)] for x in table.read(chosen.start))
        old = torch.arange(chosen.start, chosen.stop, device=k.device)
        new = old + context.table.tokens + (past.end if past else 0) - chosen.start
        k = torch.stack([turn(one[None], old, new)[0] for turn, one in zip(turns, k, strict=True)])
        context.table.extend(k, v)
        context.state.settle()
    return k, v


def _turns(runtime: Runtime) -> list[Turn]:
    found: list[Turn] = []
    for rotation in runtime.body.rotations():
        if rotation is None:
            raise ModelError(
                "the keys of this model cannot be moved: its rotation is not one that is known",
                code="unsupported",
                hint="read the texts one after another",
            )
        found.append(rotation.move)
    return found
