"""Aggregate: list the items of every chunk, unite them, and compute over them by code.

Calls after the reads: none. The model finds and names; counting and adding are exact.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from agentctx.memory.types import Stage
from agentctx.workflows.combine import Item
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import keep_record, no_information
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Operation, State
from agentctx.workflows.tasks.items import ITEMS, claim_of, items_of
from agentctx.workflows.tasks.pipeline import Pipeline

NUMBER = re.compile(r"(?:(?<![\w)])[-−+])?(?:\d{1,3}(?:[,'\u202f]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)")
ASKED: tuple[tuple[str, Operation], ...] = (  # the first that the question matches
    (r"\bhow many\b|^\W*(?:what(?: is|'s) )?the (?:total )?number of\b|^\W*count\b", "count"),
    (r"\b(?:largest|highest|greatest|maximum|longest)\b", "max"),
    (r"\b(?:smallest|lowest|minimum|shortest)\b", "min"),
    (r"\bsum of\b|\btotal\b|\baltogether\b|\bin all\W*$", "sum"),
)


@dataclass(frozen=True)
class Aggregate(Pipeline):
    """The answer's `value` holds the operation, its result, the items, and the keys with several values."""

    def read_role(self, scope: Scope) -> Role:
        return scope.role(ITEMS)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        return []

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        items = await asyncio.to_thread(items_of, run, made, state)
        return {"draft": united(run, items, run.scope.task.operation)}


def united(run: RunContext, items: Sequence[Item], operation: Operation | None) -> str:
    """The record of what `operation` makes of the items; None: what the question wants."""
    if not items:
        return no_information(run)
    operation = operation or asked_for(run.scope.task.question)
    text, result = _compute(run, operation, items)
    values: dict[str, set[str]] = {}
    for item in items:
        values.setdefault(item.key.casefold(), set()).add(item.value)
    conflicts = sorted(key for key, found in values.items() if len(found) > 1)
    if conflicts:
        run.warn("conflict", f"the sources state different values of: {', '.join(conflicts[:8])}")
    draft = {
        "text": text,
        "claims": [claim_of(item) for item in items],
        "no_information": False,
        "value": {
            "operation": operation,
            "result": result,
            "items": [{"key": item.key, "value": item.value} for item in items],
            "conflicts": conflicts,
        },
    }
    return keep_record(run, "aggregate", draft)


def asked_for(question: str) -> Operation:
    """What a question wants done with the items; to list them, unless its words say otherwise."""
    return next((op for pattern, op in ASKED if re.search(pattern, question, re.IGNORECASE)), "list")


def number_in(value: str) -> Decimal | None:
    """The first number of a text, thousands separated by commas, apostrophes or thin spaces."""
    found = NUMBER.search(value)
    if not found:
        return None
    try:
        return Decimal(re.sub(r"[,'\u202f+]", "", found[0]).replace("−", "-"))
    except InvalidOperation:
        return None


def _compute(run: RunContext, operation: Operation, items: Sequence[Item]) -> tuple[str, Any]:
    """The text to show (empty: the list itself) and the value."""
    if operation == "list":
        return "", None
    if operation == "count":
        count = len({item.key.casefold() for item in items})
        return str(count), count
    numbers = [(number, item) for item in items if (number := number_in(item.value)) is not None]
    if len(numbers) < len(items):
        run.warn("not_a_number", f"{len(items) - len(numbers)} items have no number and were left out")
    if not numbers:
        return "", None
    if operation == "sum":
        total = sum((number for number, _ in numbers), Decimal())
        return str(total), str(total)
    choose = max if operation == "max" else min
    number, item = choose(numbers, key=lambda found: found[0])
    return f"{item.key}: {item.value}", str(number)
