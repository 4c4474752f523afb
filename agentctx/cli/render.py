"""Answers and plans as text for a person: lines with a style, cleaned of what could drive a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agentctx.memory.clean import one_line, printable

if TYPE_CHECKING:
    from agentctx.memory.types import Answer, Citation, Cost, Coverage, Plan


class Line(NamedTuple):
    """A line, and how rich shows it on a terminal."""

    text: str
    style: str = ""


def answer_lines(answer: Answer, *, quiet: bool = False) -> list[Line]:
    """The answer, its citations, and the accounts of the run unless `quiet`."""
    lines = [Line(text) for text in printable(answer.text).splitlines()]
    for number, citation in enumerate(answer.citations, 1):
        lines += [Line(""), *_citation(number, citation)]
    if not quiet:
        lines += [Line(""), Line(_coverage(answer.coverage), "dim"), Line(_account(answer), "dim")]
    return lines


def plan_lines(plan: Plan) -> list[Line]:
    """The ceiling, its stages, and what it rests on."""
    lines = [
        Line(f"strategy {plan.strategy}, at most {_cost(plan.ceiling)}, about {plan.seconds:,.0f} s"),
        Line(f"reads {plan.coverage:.0%} of the input verbatim; {plan.retry_pool} retries are included"),
    ]
    if plan.stages:
        head = ("stage", "role", "calls", "input", "output", "at once", "seconds")
        rows = [
            (s.name, s.role, *_numbers(s.cost), f"{s.parallel}", f"{s.seconds:,.1f}") for s in plan.stages
        ]
        lines += [Line(""), *(Line(row) for row in columns([head, *rows]))]
    lines += [Line(f"assumes: {printable(text)}", "dim") for text in plan.assumptions]
    lines += [Line(f"instead: {printable(text)}", "dim") for text in plan.alternatives]
    return lines


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows with their cells aligned, numbers to the right."""
    table = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def _citation(number: int, citation: Citation) -> list[Line]:
    where = one_line(citation.source)
    if citation.locator:
        where += f", {citation.locator.kind} {one_line(str(citation.locator.value))}"
    elif citation.page is not None:
        where += f", page {citation.page}"
    supported = citation.verdict == "supported"
    verdict = "" if supported else f"  NOT SUPPORTED: {citation.verdict.replace('_', ' ')}"
    quote = [Line(f"    {text}".rstrip(), "italic") for text in printable(citation.quote).splitlines()]
    return [Line(f"[{number}] {where}{verdict}", "cyan" if supported else "bold red"), *quote]


def _coverage(coverage: Coverage) -> str:
    share = coverage.read / coverage.total if coverage.total else 0.0
    parts = [f"read {coverage.read:,} of {coverage.total:,} tokens ({share:.0%})"]
    if coverage.scored:
        parts.append(f"ranked {coverage.scored:,}")
    if coverage.failed:
        parts.append(f"{len(coverage.failed)} spans failed")
    if coverage.not_forwarded:
        parts.append(f"{coverage.not_forwarded} findings did not fit")
    if coverage.attention:
        left = coverage.attention
        parts.append(
            f"attention left out {left.low:.0%} to {left.high:.0%}, {left.fallbacks} rows read again"
        )
    if coverage.skipped:
        parts.append(f"{len(coverage.skipped)} sources skipped")
    return ", ".join(parts)


def _account(answer: Answer) -> str:
    spent, ceiling = answer.usage, answer.plan.ceiling
    return (
        f"{spent.calls:,} of at most {ceiling.calls:,} calls, "
        f"{spent.input_tokens:,} of {ceiling.input_tokens:,} tokens in, "
        f"{spent.output_tokens:,} of {ceiling.output_tokens:,} out, {spent.seconds:.1f} s; "
        f"{answer.strategy} with {one_line(answer.model)}; run {answer.run_id}"
    )


def _cost(cost: Cost) -> str:
    return f"{cost.calls:,} calls, {cost.input_tokens:,} tokens in, {cost.output_tokens:,} out"


def _numbers(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.calls:,}", f"{cost.input_tokens:,}", f"{cost.output_tokens:,}"
