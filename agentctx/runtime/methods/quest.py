"""Quest: the extremes of each channel bound every score of a block; the blocks with the highest bounds are
read.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. The
paper has units of 16 tokens; here a unit is a page, 64 on a CPU, which loosens the bound. Reading is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agentctx.runtime.methods.blocks import BestBlocks


@dataclass(frozen=True)
class Quest(BestBlocks):
    """Min/max bounds of each block choose what questions and answers read; the highest of a group counts."""

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "minmax"
