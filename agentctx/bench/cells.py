"""What a grid is made of: a method, with a budget, at a length. How a budget becomes a method's parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from agentctx.memory.errors import ConfigError
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.table import ANCHORS, EVICTING_ANCHORS, EVICTORS, METHODS, method

FULL = "full"
Budget = int | None  # tokens; None is everything


@dataclass(frozen=True, slots=True)
class Cell:
    """`budget` None: a method without one."""

    method: str
    budget: int | None
    length: int
    attention: str  # as `--attention` takes it


def cells(names: Sequence[str], budgets: Sequence[Budget], lengths: Sequence[int]) -> Iterator[Cell]:
    """Length by length, dense first: it is what the others are compared with.

    A budget that is not below the length is left out, but for full ones.
    """
    for length in lengths:
        yield Cell("dense", None, length, "dense")
        for name in names:
            if name == "dense":
                continue
            if size_of(method(name)) is None:
                yield Cell(name, None, length, described(name, length, length))
                continue
            for tokens in budgets:
                if tokens is None or tokens < length:
                    whole = length if tokens is None else tokens
                    yield Cell(name, whole, length, described(name, whole, length))


def size_of(kind: Dense) -> str | None:
    """The parameter that says how many tokens, or which share of them, the method reads or keeps."""
    known = {field.name for field in fields(kind)}
    if "sinks" in known and "window" in known:
        return "window"
    return next((name for name in ("budget", "keep", "local") if name in known), None)


def described(name: str, tokens: int, length: int) -> str:
    """A method with room for `tokens` of a text of `length`, without a dense beginning of its own."""
    kind: Any = method(name)
    size = size_of(kind)
    options: dict[str, float] = {}
    if size == "keep":
        options[size] = min(1.0, round(tokens / length, 4))
    elif size is not None:
        options[size] = tokens - (kind.sinks if size == "window" else 0)
    if "dense_below" in {field.name for field in fields(kind)}:
        options["dense_below"] = 0
    said = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{name}:{said}" if said else name


def parse_lengths(text: str) -> list[int]:
    """Tokens: "2k,8k", or every doubling of "1k..32k". Raises ConfigError for anything else."""
    first, dots, last = text.partition("..")
    if not dots:
        return sorted({_tokens(part) for part in text.split(",")})
    found = [_tokens(first)]
    while found[-1] * 2 <= _tokens(last):
        found.append(found[-1] * 2)
    return found


def parse_budgets(text: str) -> list[Budget]:
    """Tokens: "256,1024,full"."""
    return [None if part.strip() == FULL else _tokens(part) for part in text.split(",")]


def parse_methods(text: str) -> list[str]:
    """Names of methods; "all" is every one and the anchors. Raises ConfigError for an unknown one."""
    known = [*ANCHORS, *METHODS, *EVICTING_ANCHORS, *EVICTORS]
    if text == "all":
        return known
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no attention method {name!r}", hint=f"known: all, {', '.join(known)}"
            )
    return names


def _tokens(text: str) -> int:
    number, kilo = text.strip().lower(), 1
    if number.endswith("k"):
        number, kilo = number[:-1], 1024
    if not number.isdecimal() or not int(number):
        raise ConfigError(f"{text!r} is not a number of tokens", hint="write 512, 4096 or 4k")
    return int(number) * kilo
