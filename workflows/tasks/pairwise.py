"""Pairwise: list the items of every chunk, then ask of every two of them whether the question holds.

Calls after the reads: one for each pair. More pairs than allowed are a failure, never a cut: the items are
returned, the comparison is not made.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from math import comb
from types import MappingProxyType
from typing import Any

from pydantic import Field

from agentctx.memory.types import Failure, Stage
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.combine import Item, pairs
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import keep_record, no_information
from agentctx.workflows.roles import Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record, State
from agentctx.workflows.tasks.items import ITEMS, MOST, claim_of, items_of
from agentctx.workflows.tasks.pipeline import Pipeline


class PairReply(Reply):
    """Whether the question holds for two items."""

    example = MappingProxyType({"holds": True, "reason": "in one sentence"})

    holds: bool
    reason: str = Field(default="", max_length=400)


PAIR = Role(
    "pair",
    1,
    "You are given two items found in a longer source. holds says whether the two belong together as the "
    "question asks.",
    PairReply,
    120,
)


@dataclass(frozen=True)
class Pairwise(Pipeline):
    """The answer's `value` holds the pairs of keys for which the question holds, and how many were asked."""

    def read_role(self, scope: Scope) -> Role:
        return scope.role(ITEMS)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        calls = min(self.max_pairs, comb(MOST * len(made.reads), 2))
        role = scope.role(PAIR)
        empty = scope.prompt_tokens(
            role.render(scope.task.question, [("item 1", ""), ("item 2", "")], scope.tag)
        )
        room = scope.profile.window - role.max_output
        each = min(room, empty + 2 * scope.role(ITEMS).max_output)
        return [cost.stage("pairs", role.name, [each] * calls, role.max_output, scope.profile)]

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        items = await asyncio.to_thread(items_of, run, made, state)
        if not items:
            return {"draft": no_information(run)}
        found = pairs(items, self.max_pairs)
        if isinstance(found, Failure):
            value = {"items": [item.key for item in items], "pairs": None, "compared": 0}
            draft: dict[str, Any] = {"text": "", "claims": list(map(claim_of, items)), "value": value}
            return {"draft": keep_record(run, "pairs", draft), "failures": {"pairs": asdict(found)}}
        replies = await asyncio.gather(*(_compare(run, one, other) for one, other in found))
        together = [
            (one, other, reply.data["reason"])
            for (one, other), reply in zip(found, replies, strict=True)
            if isinstance(reply, Record) and reply.data["holds"]
        ]
        failed = [reply for reply in replies if isinstance(reply, Failure)]
        draft = {
            "text": "",
            "claims": [_claim(one, other, reason) for one, other, reason in together],
            "no_information": not together,
            "value": {
                "items": [item.key for item in items],
                "pairs": [[one.key, other.key] for one, other, _ in together],
                "compared": len(found) - len(failed),
            },
        }
        failures = {"pairs": asdict(failed[0])} if failed else {}
        return {"draft": keep_record(run, "pairs", draft), "failures": failures}


async def _compare(run: RunContext, one: Item, other: Item) -> Record | Failure:
    pieces = [(f"item {n}", _shown(item)) for n, item in enumerate((one, other), 1)]
    return await ask(run, run.scope.role(PAIR), run.scope.task.question, pieces, finishing=True)


def _shown(item: Item) -> str:
    return "\n".join([f"{item.key}: {item.value}", *(evidence.quote for evidence in item.evidence[:1])])


def _claim(one: Item, other: Item, reason: str) -> dict[str, Any]:
    text = f"{one.key} and {other.key}" + (f": {reason}" if reason else "")
    return {"text": text, "quotes": [], "spans": claim_of(one)["spans"] + claim_of(other)["spans"]}
