"""Rank passages by their words alone, read the best: the baseline, and what the smallest budget pays for.

Cost: one call; no passage is scored by the model. BM25: Robertson and Zaragoza, 2009,
https://doi.org/10.1561/1500000019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agentctx.workflows.strategies.spans import Method, Spans


@dataclass(frozen=True)
class Lexical(Spans):
    """`spans` without the Reader."""

    name: ClassVar[str] = "lexical"
    method: Method = "lexical"
