"""The cost model: what a strategy will spend at most, computed before anything is spent.

    R = Σ_{j=1..D} ⌈L/f^j⌉, D the least d with f^d ≥ L      merges of a reduce tree over L reads
    ceiling = C0 + X · (1 call, i_max, o_max)                  X extra attempts for the whole run
    X = max(2 + ⌈C0/10⌉, min(C0, P) + 1)                       P calls in flight

The second bound pays for what a killed process had in flight: those calls may have been charged, so they
count as spent, and the resumed run makes them again.

Integers only; a logarithm of floats gives a wrong depth at exact powers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Cost, Plan, Stage
from agentctx.workflows.profile import ModelProfile

NOTHING = Cost()
# A repair sends the failed reply back with one sentence on what was wrong with it.
REPAIR_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Tree:
    """A reduce tree: merges per level, from the leaves to the root."""

    levels: tuple[int, ...]

    @property
    def merges(self) -> int:
        return sum(self.levels)


def tree(leaves: int, fan_in: int) -> Tree:
    """The reduce tree over `leaves` results, merging at most `fan_in` at a time."""
    if leaves > 1 and fan_in < 2:
        raise ConfigError(
            f"a merge must take at least 2 results, but only {fan_in} fit the window",
            hint="use a model with a larger window, or smaller records",
        )
    levels = []
    while leaves > 1:
        leaves = -(-leaves // fan_in)
        levels.append(leaves)
    return Tree(tuple(levels))


def retry_pool(calls: int, concurrency: int) -> int:
    """Extra attempts that a run of `calls` planned calls may make in all."""
    return max(2 + -(-calls // 10), min(calls, concurrency) + 1) if calls else 0


def stage(
    name: str,
    role: str,
    inputs: Sequence[int],
    output: int,
    profile: ModelProfile,
    *,
    waves: int | None = None,
) -> Stage:
    """A stage of one call per entry of `inputs` (its prompt's tokens), each returning at most `output`."""
    calls, total = len(inputs), sum(inputs)
    parallel = min(max(calls, 1), profile.concurrency)
    mean = total / calls if calls else 0
    each = profile.latency + mean / profile.rate_in + output / profile.rate_out
    rounds = waves if waves is not None else math.ceil(calls / parallel)
    return Stage(name, role, Cost(calls, total, output * calls), parallel, rounds * each if calls else 0.0)


def scoring(name: str, tokens: int, profile: ModelProfile) -> Stage:
    """A stage in which the Reader looks at `tokens` tokens and generates none."""
    return Stage(name, "", Cost(0, tokens, 0), 1, tokens / profile.rate_in)


def without_retries(plan: Plan) -> Cost:
    """What the plan costs if no call has to be repeated."""
    return sum((part.cost for part in plan.stages), Cost())


def make_plan(
    strategy: str,
    params: dict[str, Any],
    stages: Sequence[Stage],
    *,
    largest_input: int,
    largest_output: int,
    hold: Cost,
    coverage: float,
    supersteps: int,
    assumptions: Sequence[str] = (),
    alternatives: Sequence[str] = (),
) -> Plan:
    """Sum the stages and add the pool of extra attempts at the price of the largest call."""
    base = sum((part.cost for part in stages), Cost())
    extra = retry_pool(base.calls, max(part.parallel for part in stages))
    ceiling = base + Cost(1, largest_input + largest_output + REPAIR_TOKENS, largest_output) * extra
    return Plan(
        strategy=strategy,
        params=params,
        stages=tuple(stages),
        ceiling=ceiling,
        seconds=round(sum(part.seconds for part in stages), 2),
        retry_pool=extra,
        hold=hold,
        coverage=round(coverage, 4),
        supersteps=supersteps,
        assumptions=tuple(assumptions),
        alternatives=tuple(alternatives),
    )
