"""`agentctx ask`, `agentctx summarize`, and the same two under `agentctx plan`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from agentctx.cli.each import ask_each
from agentctx.cli.options import Options, Paths, expand
from agentctx.cli.run import Job, execute
from agentctx.memory.errors import ConfigError

Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="What to find out.", show_default=False)
]
Focus = Annotated[str | None, typer.Option(help="What the summary should look at.", metavar="TEXT")]


class Per(StrEnum):
    """What one summary covers."""

    all = "all"
    file = "file"
    chapter = "chapter"


class Kind(StrEnum):
    """What sort of answer a question wants."""

    search = "search"
    multi_hop = "multi_hop"
    classify = "classify"
    aggregate = "aggregate"
    pairwise = "pairwise"


OfKind = Annotated[
    Kind, typer.Option("--kind", help="search, multi_hop, classify, aggregate or pairwise.", metavar="KIND")
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="To choose from, with --kind classify.", metavar="TEXT")
]
EachSource = Annotated[bool, typer.Option("--each", help="An answer for each source by itself.")]
plan = typer.Typer(help="Show what a command would cost at most, without a model call.")


@expand
def ask(
    options: Options,
    question: Question = None,
    paths: Paths = None,
    kind: OfKind = Kind.search,
    label: Labels = None,
    each: EachSource = False,
) -> None:
    """Answer a question over files, with citations that were checked against them."""
    if question is None and not options.resume:
        raise ConfigError("a question is missing", hint="agentctx ask QUESTION [PATH]...")
    job = Job("ask", "ask", paths or (), question, kind=kind.value, labels=label or ())
    if each:
        ask_each(job, options, "file", table=False)
    else:
        execute(job, options)


@expand
def summarize(options: Options, paths: Paths = None, per: Per = Per.all, focus: Focus = None) -> None:
    """Summarise files completely, each chunk read once."""
    execute(Job("summarize", "summarize", paths or (), focus, per.value), options)


@plan.command("ask")
@expand
def plan_ask(
    options: Options,
    question: Question = None,
    paths: Paths = None,
    kind: OfKind = Kind.search,
    label: Labels = None,
) -> None:
    """What `ask` would cost at most."""
    if question is None:
        raise ConfigError("a question is missing", hint="agentctx plan ask QUESTION [PATH]...")
    job = Job("plan ask", "ask", paths or (), question, kind=kind.value, labels=label or ())
    execute(job, replace(options, dry_run=True, resume=None))


@plan.command("summarize")
@expand
def plan_summarize(options: Options, paths: Paths = None, per: Per = Per.all, focus: Focus = None) -> None:
    """What `summarize` would cost at most."""
    execute(
        Job("plan summarize", "summarize", paths or (), focus, per.value),
        replace(options, dry_run=True, resume=None),
    )
