"""Make a permutation of what a model wrote as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Permuted(NamedTuple):
    """`order` of `range(size)`; `missing` were not named, `unknown` were named and are none or come again."""

    order: list[int]
    missing: int
    unknown: int


def permuted(ids: Sequence[int], size: int) -> Permuted:
    """`ids` count from 1. Those that are missing stand behind, in the order they had."""
    named = [number - 1 for number in dict.fromkeys(ids) if 1 <= number <= size]
    left = sorted(set(range(size)).difference(named))
    return Permuted([*named, *left], len(left), len(ids) - len(named))
