"""One model under one attention method: how close it stays to dense attention, and what it still finds.

A text is read up to three quarters; the last quarter is asked: its tokens are fed as a question would be, and
what the model expects after each is compared with what it expects under dense attention. So a method that
only asks differently is measured where it differs, over the reading that all such methods share.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.bench.machine import forget_peak, peak_mib
from agentctx.bench.tasks import REPLY, Item
from agentctx.bench.texts import Text
from agentctx.models.weights import Weights
from agentctx.runtime.context import Context
from agentctx.runtime.engine import ASKED, Engine
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.sparse import Sparse
from agentctx.runtime.methods.table import method

ROWS = 256  # positions that are turned into logits at a time
GUARDED = 256  # tokens at the end of a text over which the bracket is taken


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over the positions of one text. `kl` is of dense from the method, in nats, as are the losses."""

    text: str
    positions: int
    agreement: float
    kl: float
    nll: float
    dense_nll: float
    read_cpu_s: float
    ask_cpu_s: float


@dataclass(slots=True)
class Expected:
    """What dense attention says of a text: hidden states of the asked tokens, and the time to read it."""

    hidden: Tensor
    read_cpu_s: float


class Subject:
    """A model with an attention method: over the dense readings of `weights` where it only asks differently.

    Raises ConfigError for a method that there is not, or that the budget does not suit.
    """

    def __init__(self, weights: Weights, attention: str) -> None:
        self.tokenizer, self.ends = weights.tokenizer, weights.ends
        self.attention = attention
        self.method = method(attention)
        engine = weights.engine
        self.shared = attention == "dense" or self.method.evicts or _only_asks(self.method)
        if not self.shared:
            engine = Engine(
                engine.body,
                fingerprint=weights.fingerprint,
                memory_bytes=engine.pool.budget,
                method=self.method,
            )
        self.engine = engine

    def read(self, ids: Sequence[int]) -> Context:
        """Hold a text; what is asked next is asked by the method."""
        context = self.engine.read(ids)
        if self.shared:
            try:
                context = self.method.reduce(context, len(ids))
            except BaseException:
                context.close()
                raise
            context.state.method = self.method
        return context

    def ask(self, context: Context, ids: Sequence[int]) -> Tensor:
        """Feed tokens; hidden states `[T, H]`."""
        found = []
        for start in range(0, len(ids), self.engine.chunk):
            piece = list(ids[start : start + self.engine.chunk])
            found.append(self.engine.step([context], torch.tensor([piece]))[0])
            context.ids += piece
        return torch.cat(found)

    def expect(self, text: Text) -> Expected:
        """Measured under dense attention, this is what the others are compared with."""
        read, asked = _parts(text)
        began = time.process_time()
        with closing(self.read(read)) as context:
            taken = time.process_time() - began
            return Expected(self.ask(context, asked), taken)

    def agreement(self, text: Text, expected: Expected) -> Agreement:
        """Teacher forcing over the last quarter of a text."""
        read, asked = _parts(text)
        began = time.process_time()
        with closing(self.read(read)) as context:
            taken = time.process_time() - began
            began = time.process_time()
            hidden = self.ask(context, asked)
            asking = time.process_time() - began
        sums = torch.zeros(4, dtype=torch.float64)
        targets = torch.tensor(asked[1:])
        for start in range(0, len(targets), ROWS):
            rows = slice(start, min(start + ROWS, len(targets)))
            sums += self._compared(hidden[rows], expected.hidden[rows], targets[rows])
        agreement, kl, nll, dense_nll = (float(value) for value in sums / len(targets))
        return Agreement(
            text=text.name,
            positions=len(targets),
            agreement=agreement,
            kl=kl,
            nll=nll,
            dense_nll=dense_nll,
            read_cpu_s=expected.read_cpu_s if self.shared else taken,
            ask_cpu_s=asking,
        )

    def bracket(self, text: Text) -> dict[str, float] | None:
        """Bounds of the attention left out at a text's end, means over rows; None without a guard."""
        if not hasattr(self.method, "guard"):
            return None
        join = "," if ":" in self.attention else ":"
        guarded = method(f"{self.attention}{join}guard=report")
        with closing(self.read(text.ids[:-GUARDED])) as context:
            context.state.method = guarded
            self.ask(context, text.ids[-GUARDED:])
            seen = context.state.notes[0].coverage
        rows = max(1, seen.rows)
        return {"low": seen.low / rows, "high": seen.high / rows, "worst": seen.worst}

    def reply(self, item: Item) -> str:
        """Greedy, to the last answer at most: more words change no score."""
        ids: list[int] = self.tokenizer.encode(item.prompt, special=True)
        read = max(0, len(ids) - ASKED) // self.engine.method.grid * self.engine.method.grid
        said: list[int] = []
        most = max(REPLY, 2 * sum(len(answer) for answer in item.answers))
        with closing(self.read(ids[:read])) as context:
            hidden = self.ask(context, ids[read:])[-1]
            while len(said) < most:
                token = int(self.engine.logits(hidden).argmax())
                said.append(token)
                words = self.tokenizer.decode(said, special=True)
                if token in self.ends or item.score(words) == 1.0:
                    break
                hidden = self.ask(context, [token])[-1]
        return self.tokenizer.decode(said, special=True)

    def _compared(self, hidden: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
        """Sums over the rows: agreement, KL, loss, loss of dense."""
        own = self.engine.logits(hidden).log_softmax(-1).cpu()
        other = self.engine.logits(dense).log_softmax(-1).cpu()
        return torch.stack(
            [
                (own.argmax(-1) == other.argmax(-1)).sum(),
                F.kl_div(own, other, log_target=True, reduction="sum"),
                F.nll_loss(own, targets, reduction="sum"),
                F.nll_loss(other, targets, reduction="sum"),
            ]
        ).double()


def measured(
    weights: Weights,
    attention: str,
    texts: Sequence[Text],
    expected: Sequence[Expected],
    tasks: Sequence[Item],
) -> dict[str, Any]:
    """All that is known of a method over these texts and tasks; `texts` or `tasks` may be empty."""
    forget_peak()
    began = time.monotonic()
    subject = Subject(weights, attention)
    found: dict[str, Any] = {}
    if texts:
        rows = [subject.agreement(text, dense) for text, dense in zip(texts, expected, strict=True)]
        found["texts"] = [asdict(row) for row in rows]
        found["bracket"] = subject.bracket(texts[0])
    if tasks:
        found["tasks"] = [
            {"item": item.name, "task": item.task, "score": round(item.score(subject.reply(item)), 4)}
            for item in tasks
        ]
    return found | {"seconds": round(time.monotonic() - began, 1), "peak_mib": peak_mib()}


def _only_asks(chosen: Dense) -> bool:
    """Whether the method goes over a dense reading, so that one serves all of its kind."""
    return isinstance(chosen, Sparse) and chosen.while_asking and not chosen.while_reading


def _parts(text: Text) -> tuple[tuple[int, ...], tuple[int, ...]]:
    read = len(text.ids) * 3 // 4
    return text.ids[:read], text.ids[read:]
