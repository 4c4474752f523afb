"""Combine what several reads returned, without a model call.

The laws make results independent of the order in which reads finish: `concat` is associative with the empty
list as its identity; `merge` is associative, commutative and idempotent; `vote` ignores the order of ballots.
Evidence is keyed by its span, so overlapping chunks cannot count one fact twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TypeVar

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Evidence, Failure, Span

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that reads found: what it is about, what they say of it, and where it stands."""

    key: str
    value: str
    evidence: tuple[Evidence, ...] = ()


def concat(lists: Iterable[Sequence[A]]) -> list[A]:
    """All elements in order."""
    return list(chain.from_iterable(lists))


def unite(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """Evidence in source order, one per span; of two for one span the better scored stays."""
    by_span: dict[Span, Evidence] = {}
    for one in evidence:
        other = by_span.get(one.span, one)
        by_span[one.span] = max(one, other, key=_rank)
    return tuple(by_span[span] for span in sorted(by_span))


def merge(lists: Iterable[Sequence[Item]], key: Callable[[str], str] = str.casefold) -> list[Item]:
    """Unite the items of equal key and value; equal keys with different values stay side by side.

    `key` says when two keys mean the same; of those the first in alphabetical order is shown. The result is
    sorted by key, then value.
    """
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in chain.from_iterable(lists):
        groups.setdefault((key(item.key), item.value), []).append(item)
    return [
        Item(min(item.key for item in group), value, unite(concat(item.evidence for item in group)))
        for (_, value), group in sorted(groups.items())
    ]


def vote(ballots: Iterable[tuple[str, float]], labels: Sequence[str]) -> tuple[str, float]:
    """The label with the most weight, and its lead over the second as a share of all weight.

    A tie goes to the label that `labels` lists first, with margin 0. Raises ConfigError for no labels, a
    label that is not listed, or a weight that is negative or not finite.
    """
    weights: dict[str, list[float]] = {label: [] for label in labels}
    for label, weight in ballots:
        if label not in weights:
            raise ConfigError(f"a vote for {label!r}", hint=f"the labels are {', '.join(labels)}")
        if not 0 <= weight < math.inf:
            raise ConfigError(
                f"a vote of weight {weight} for {label!r}", hint="weights are finite, not negative"
            )
        weights[label].append(weight)
    if not weights:
        raise ConfigError("a vote without labels", hint="list the labels that may win")
    totals = {label: math.fsum(given) for label, given in weights.items()}  # exact, so order cannot matter
    best, *others = sorted(totals, key=lambda label: -totals[label])
    lead = totals[best] - (totals[others[0]] if others else 0.0)
    return best, lead / math.fsum(totals.values()) if lead else 0.0


def cross(
    left: Sequence[A], right: Sequence[B], predicate: Callable[[A, B], bool], max_pairs: int
) -> list[tuple[A, B]] | Failure:
    """The pairs that satisfy `predicate`, in order; a Failure, and no part, if there are more to examine."""
    pairs = len(left) * len(right)
    if pairs > max_pairs:
        return Failure("budget", f"{pairs} pairs to compare; {max_pairs} are allowed")
    return [(one, other) for one in left for other in right if predicate(one, other)]


def pairs(items: Sequence[A], max_pairs: int) -> list[tuple[A, A]] | Failure:
    """Every two of the items, in order; a Failure, and no part, if there are more than `max_pairs`."""
    count = math.comb(len(items), 2)
    if count > max_pairs:
        return Failure("budget", f"{count} pairs to compare; {max_pairs} are allowed")
    return list(combinations(items, 2))


def _rank(evidence: Evidence) -> tuple[float, str, str, str, str, str]:
    """A total order, so that which of two stays does not depend on which came first."""
    return (evidence.score, evidence.note, evidence.producer, evidence.origin, evidence.id, evidence.quote)
