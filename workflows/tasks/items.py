"""Items: what reads list, each under a key, with a value and the words that state it.

The same key found twice is one item; different values under one key stay side by side, as a conflict.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from pydantic import Field

from agentctx.memory.types import Evidence
from agentctx.workflows.combine import Item, merge
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import item_text, places_of, verified
from agentctx.workflows.roles import Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.state import State

MOST = 24  # items of one read


class Listed(Reply):
    """One thing that a text states."""

    key: str = Field(max_length=200)
    value: str = Field(default="", max_length=400)
    quotes: list[str] = Field(default_factory=list, max_length=3)


class ItemsReply(Reply):
    """The things that the question asks for in one stretch of text."""

    example = MappingProxyType(
        {
            "items": (
                MappingProxyType(
                    {
                        "key": "its name",
                        "value": "what the text says of it",
                        "quotes": ("words copied exactly",),
                    }
                ),
            ),
            "no_information": False,
        }
    )

    joins = "items"

    items: list[Listed] = Field(default_factory=list, max_length=MOST)
    no_information: bool = False


ITEMS = Role(
    "items",
    1,
    "You read part of a longer source and list each thing that the question asks for. key is its name, "
    "always written the same way; value is what the text says of it, a number with its unit where one is "
    "asked for. For each you copy, character for character, the words that state it. If there is none, set "
    "no_information to true.",
    ItemsReply,
    600,
)


def items_of(run: RunContext, made: Cut, state: State) -> list[Item]:
    """The items of all reads, united; those without a verified quote are left out, and that is said."""
    reads = state.get("reads", {})
    records = run.cache.get_many(list(reads.values()))
    lists: list[list[Item]] = []
    dropped = 0
    for number in sorted(map(int, reads)):
        spans = [made.chunks[i].span for i in made.reads[number].chunks]
        mine: list[Item] = []
        for listed in records[reads[str(number)]]["items"]:
            places = verified(run, listed["quotes"], spans)
            dropped += not places
            if places and listed["key"].strip():
                evidence = tuple(Evidence(span, run.scope.text(span)) for span in places)
                mine.append(Item(_plain(listed["key"]), _plain(listed["value"]), evidence))
        lists.append(mine)
    if dropped:
        run.warn("item_without_quote", f"{dropped} items without a quote from the text were left out")
    return merge(lists)


def claim_of(item: Item) -> dict[str, Any]:
    """The item as a statement at the places that state it."""
    places = places_of(evidence.span for evidence in item.evidence)
    return {"text": item_text(item.key, item.value), "quotes": [], "spans": places}


def _plain(text: str) -> str:
    return " ".join(text.split())
