"""What each attention method says of itself, for `agentctx bench attention --list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from agentctx.bench.cells import size_of
from agentctx.runtime.methods.table import ANCHORS, EVICTING_ANCHORS, method

PROPERTIES = (
    "while_reading",
    "while_asking",
    "endless",
    "moves",
    "evicts",
    "query_aware",
    "chunk_invariant",
    "batched",
)


def declared(names: Sequence[str]) -> list[dict[str, Any]]:
    """Properties, default parameters and the one that a budget sets; a property not declared is absent."""
    found = []
    for name in names:
        kind = method(name)
        found.append(
            {
                "name": name,
                "anchor": name in ANCHORS or name in EVICTING_ANCHORS,
                "budget": size_of(kind),
                "grid": kind.grid,
                "changes_what_is_stored": bool(kind.writes),
                "parameters": asdict(kind),
            }
            | {key: getattr(kind, key) for key in PROPERTIES if hasattr(kind, key)}
        )
    return found
