"""From the grid to `attention="auto"`: the cheapest method that loses nothing where it was measured.

A method with a budget qualifies at a length if it gives the same next token as dense attention at least 98
times of 100, its loss rises by 1 % at most (of both the unfavourable end of the interval counts), and its
score in the tasks is within a point. It must qualify there and at every longer length measured; rows before
that length stay dense, which is what `dense_below` is for: methods without it are not chosen. The cheapest
takes the least processor time at the longest length, and less than dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agentctx.runtime.methods.table import ANCHORS, AUTO, EVICTING_ANCHORS

AGREEMENT = 0.98
NLL_RISE = 0.01
POINT = 0.01
Record = dict[str, Any]


def chosen(grid: dict[str, Any]) -> dict[str, Any]:
    """By the name of a model: its `attention`, the fingerprint, and what qualifies at each length.

    Where a model was measured as several files or by several loaders, the last counts.
    """
    table: dict[str, Any] = {}
    for name, fingerprint in {run["model"]: run["fingerprint"] for run in grid["runs"]}.items():
        own = [cell for cell in grid["cells"] if grid["runs"][cell["run"]]["fingerprint"] == fingerprint]
        records = {(cell["attention"], cell["length"]): cell for cell in own}.values()  # the latest of each
        dense = {
            cell["length"]: cell for cell in records if cell["method"] == "dense" and "agreement" in cell
        }
        passed = [cell for cell in records if qualifies(cell, dense.get(cell["length"]))]
        found = sorted(_candidates(passed, dense), key=lambda pair: pair[0]) if dense else []
        table[name] = {
            "attention": found[0][1] if found else AUTO,
            "fingerprint": fingerprint,
            "qualified": {
                str(length): [cell["attention"] for cell in passed if cell["length"] == length]
                for length in sorted(dense)
            },
        }
    return table


def qualifies(cell: Record, dense: Record | None) -> bool:
    """Whether a cell is within the limits, and all of them were measured."""
    if (
        dense is None
        or cell["method"] in ("dense", *ANCHORS, *EVICTING_ANCHORS)
        or not {"agreement", "score"} <= cell.keys()
    ):
        return False
    return bool(
        cell["agreement"]["low"] >= AGREEMENT
        and cell["nll_rise"]["high"] <= NLL_RISE
        and cell["score"]["mean"] >= dense["score"]["mean"] - POINT
    )


def _candidates(passed: Sequence[Record], dense: dict[int, Record]) -> Iterator[tuple[float, str]]:
    """Processor seconds at the longest length, and the method from the shortest length that it may serve."""
    descending = sorted(dense, reverse=True)
    for cell in passed:
        if cell["length"] != descending[0] or cell["cpu_s"] >= dense[descending[0]]["cpu_s"]:
            continue
        if "dense_below=0" not in cell["attention"]:
            continue
        served = [other["length"] for other in passed if other["attention"] == cell["attention"]]
        unbroken = [a for a, b in zip(descending, sorted(served, reverse=True), strict=False) if a == b]
        yield cell["cpu_s"], cell["attention"].replace("dense_below=0", f"dense_below={unbroken[-1]}")
