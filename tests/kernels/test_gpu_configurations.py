"""The table of the README is the one that ships."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from agentctx.kernels.choose import OPERATIONS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

README = Path(__file__).parents[2] / "kernels" / "README.md"
ROW = re.compile(r"\| (`[a-z_`, ]+`) \| `([a-z_]+)\.py` \| ([^|]+?)(?: \(16,384 blocks\))? \|")
# What `dim` counts where it is no head size, and the rows of a tile.
DIMS = {"selection": 16_384, "rope": 64}
ROWS = {"prefill": 128, "mass": 128, "nsa": 128}


def listed() -> dict[str, tuple[str, str]]:
    """File and launch of each operation in the table."""
    section = README.read_text().partition("## On a GPU")[2].partition("## Measuring")[0]
    rows = ROW.findall(section)
    return {name: (file, launch) for names, file, launch in rows for name in re.findall("`(.*?)`", names)}


def test_every_operation_in_triton_is_listed() -> None:
    there = {
        name
        for name, file in OPERATIONS.items()
        if find_spec(f"agentctx.kernels.gpu.{file}") is not None
        and hasattr(import_module(f"agentctx.kernels.gpu.{file}"), name)
    }
    assert set(listed()) == there


@pytest.mark.parametrize(("file", "launch"), sorted(set(listed().values())))
def test_launches_are_those_of_the_table(file: str, launch: str) -> None:
    from agentctx.kernels.gpu.configs import pick

    table = import_module(f"agentctx.kernels.gpu.{file}").CONFIGS
    row = pick(table, 90, dim=DIMS.get(file, 128), rows=ROWS.get(file, 1))
    blocks = [f"{name} {size}" for name, size in row.blocks.items()]
    stages = f"{row.stages} stage{'s' if row.stages > 1 else ''}"
    assert launch == ", ".join([*blocks, f"{row.warps} warps", stages])
