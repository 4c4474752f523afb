"""The grid of qualities: every method, budget and length, measured once, kept in one file, and resumed.

`grid.json` has a record for each cell and, for each run that added some, the machine and the versions. A cell
is known by what it measures: weights, method, length, texts and tasks. So a run that was killed goes on after
its last cell, and another model, text or parameter never finds a figure that is not its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentctx.bench.cells import Budget, Cell, cells
from agentctx.bench.fidelity import Expected, Subject, measured
from agentctx.bench.machine import environment
from agentctx.bench.tasks import Item, items
from agentctx.bench.texts import Text, collect
from agentctx.memory.atomic import write_bytes
from agentctx.memory.errors import ConfigError, ModelError, StoreError
from agentctx.models.weights import Weights

SCHEMA = 1
RESAMPLES = 2000
TASKS = ("agreement", "ruler")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `texts` and `items`: how many of each at every length."""

    methods: Sequence[str]
    budgets: Sequence[Budget]
    lengths: Sequence[int]
    tasks: Sequence[str] = TASKS
    data: Sequence[Path] = ()
    texts: int = 4
    items: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ConfigError(f"there is no task {unknown[0]!r}", hint=f"known: {', '.join(TASKS)}")


@dataclass(slots=True)
class Length:
    """What is measured at one length, read when the first cell needs it."""

    texts: list[Text]
    tasks: list[Item]
    expected: list[Expected] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Changes with every token and every word."""
        said = repr(([text.ids for text in self.texts], self.tasks))
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def quick(window: int, methods: Sequence[str]) -> Plan:
    """All that there is to measure, once, on little text."""
    length = min(window, 1024)
    return Plan(methods, [length // 2], [length], texts=1, items=1)


def run(weights: Weights, plan: Plan, path: Path, say: Say) -> dict[str, Any]:
    """Measure every cell that `path` lacks, write it after each, and return the whole grid.

    Raises StoreError if the file is damaged or of another version, InputError where the data has no text of
    a length.
    """
    grid = load(path)
    this = environment() | {"model": weights.name, "fingerprint": weights.fingerprint}
    known = {record["key"] for record in grid["cells"]}
    subjects: dict[int, Length] = {}
    for cell in cells(plan.methods, plan.budgets, sorted(set(plan.lengths))):
        if cell.length not in subjects:
            subjects = {cell.length: _subject(weights, plan, cell.length)}  # readings of the others can go
        length = subjects[cell.length]
        key = _key(weights, cell, length, plan.tasks)
        if key in known:
            continue
        if this not in grid["runs"]:
            grid["runs"].append(this)
        record = {
            "key": key,
            "run": grid["runs"].index(this),
            "data": length.name,
            "method": cell.method,
            "budget": cell.budget,
            "length": cell.length,
            "attention": cell.attention,
        } | _measure(weights, cell, length)
        known.add(key)
        grid["cells"].append(record)
        write_bytes(path, (json.dumps(grid, indent=1) + "\n").encode())
        say(line(record))
    return grid


def load(path: Path) -> dict[str, Any]:
    """The grid in a file, or an empty one. Raises StoreError (corrupt, version)."""
    if not path.exists():
        return {"schema": SCHEMA, "runs": [], "cells": []}
    try:
        grid: dict[str, Any] = json.loads(path.read_bytes())
        schema = grid["schema"]
    except (ValueError, KeyError, TypeError) as error:
        hint = "remove it, or choose --out"
        raise StoreError(f"{path} is not a grid", code="corrupt", hint=hint) from error
    if schema != SCHEMA:
        raise StoreError(
            f"{path} is a grid of version {schema}, this is {SCHEMA}", code="version", hint="choose --out"
        )
    return grid


def line(record: dict[str, Any]) -> str:
    """A cell as a person reads it."""
    said = f"{record['length']:6} {record['attention']:40}"
    if "refused" in record:
        return f"{said} not possible: {record['refused']}"
    if "agreement" in record:
        said += f" agreement {record['agreement']['mean']:.4f}  KL {record['kl']['mean']:.4f}"
        said += f"  NLL {record['nll_rise']['mean']:+.2%}"
    if "score" in record:
        said += f"  tasks {record['score']['mean']:.3f}"
    return f"{said}  {record['seconds']:.0f} s"


def _subject(weights: Weights, plan: Plan, length: int) -> Length:
    tokenizer = weights.tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    compared = "agreement" in plan.tasks and length <= weights.context  # beyond it dense attention ends
    texts = collect(plan.data, tokenizer, length, plan.texts) if compared else []
    tasks = items(plan.data, count, length, plan.items, plan.seed) if "ruler" in plan.tasks else []
    return Length(texts, tasks)


def _key(weights: Weights, cell: Cell, length: Length, tasks: Sequence[str]) -> str:
    parts = (weights.fingerprint, cell.attention, cell.length, length.name, sorted(tasks))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _measure(weights: Weights, cell: Cell, length: Length) -> dict[str, Any]:
    if length.texts and not length.expected:
        weights.engine.prefixes.clear()  # or a shorter reading of the same text would be free
        dense = Subject(weights, "dense")
        length.expected = [dense.expect(text) for text in length.texts]
    try:
        found = measured(weights, cell.attention, length.texts, length.expected, length.tasks)
    except (ConfigError, ModelError) as error:
        if isinstance(error, ModelError) and error.code not in ("unsupported", "overflow"):
            raise
        return {"refused": error.message}
    return found | summary(found)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Means and 95 % bootstrap intervals over texts, and over tasks."""
    said: dict[str, Any] = {}
    if rows := found.get("texts"):
        said["agreement"] = interval(rows, lambda some: some["agreement"].mean(-1))
        said["kl"] = interval(rows, lambda some: some["kl"].mean(-1))
        said["nll_rise"] = interval(rows, lambda some: some["nll"].mean(-1) / some["dense_nll"].mean(-1) - 1)
        said["cpu_s"] = round(sum(row["read_cpu_s"] + row["ask_cpu_s"] for row in rows) / len(rows), 2)
    if rows := found.get("tasks"):
        said["score"] = interval(rows, lambda some: some["score"].mean(-1))
    return said


def interval(
    rows: Sequence[dict[str, Any]], statistic: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> dict[str, Any]:
    """The statistic of all rows, and between which values it lies for 95 % of samples of them."""
    columns = {
        name: np.array([row[name] for row in rows])
        for name, value in rows[0].items()
        if not isinstance(value, str)
    }
    draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    drawn = statistic({name: column[draws] for name, column in columns.items()})
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = float(statistic(columns))
    return {"mean": round(mean, 5), "low": round(float(low), 5), "high": round(float(high), 5)}
