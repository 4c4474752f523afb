"""Process B: every shipped configuration is compiled for GPUs that are not there, within its budget.

    python -m pytest tests/kernels/compiled            # --record writes the budgets of this Triton version

`budgets/<file>.json` holds, for each Triton version, the registers and the bytes of shared memory of every
variant. A kernel may take 16 registers more and no byte more; a change needs a reason in the commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aot
import pytest
import triton

BUDGETS = Path(__file__).parent / "budgets"
VERSION = ".".join(triton.__version__.split(".")[:2])
SLACK = 16  # registers

Within = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the budgets of this Triton version")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.fixture
def within(request: pytest.FixtureRequest) -> Within:
    """`within(variant, report, at_least={...}, at_most={...})`: the report keeps the budget of `variant`.

    A Triton version that has no budgets is held to those of the newest that has.
    """
    file = BUDGETS / f"{request.path.stem.removeprefix('test_')}.json"

    def check(variant: str, report: aot.Report, **wanted: Any) -> None:
        name = f"{variant} sm_{report.arch}"
        table: dict[str, dict[str, list[int]]] = json.loads(file.read_text()) if file.exists() else {}
        if request.config.getoption("--record"):
            report.require(**wanted)
            table.setdefault(VERSION, {})[name] = [report.registers, report.shared]
            lines = [
                f'  "{version}": {{\n'
                + ",\n".join(f'    "{key}": {value}' for key, value in sorted(rows.items()))
                + "\n  }"
                for version, rows in sorted(table.items())
            ]
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            return
        rows = table[VERSION if VERSION in table else max(table, key=_number)]
        assert name in rows, f"no budget for {name}: --record writes one"
        registers, shared = rows[name]
        report.require(max_registers=min(255, registers + SLACK), max_shared=shared, **wanted)

    return check
