"""`agentctx rank`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from agentctx.cli.options import Options, Paths, expand
from agentctx.cli.run import Job, execute
from agentctx.memory.errors import ConfigError


class Mode(StrEnum):
    """Who orders."""

    auto = "auto"
    likelihood = "likelihood"
    window = "window"
    listwise = "listwise"


class By(StrEnum):
    """What is ordered."""

    auto = "auto"
    document = "document"
    passage = "passage"


Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="What it should answer.", show_default=False)
]
Top = Annotated[int, typer.Option(help="How many are quoted.", metavar="N")]
InMode = Annotated[
    Mode, typer.Option("--mode", help="likelihood, or a chat model's window or listwise.", metavar="NAME")
]
OfThese = Annotated[By, typer.Option("--by", help="document or passage.", metavar="NAME")]


@expand
def rank(
    options: Options,
    question: Question = None,
    paths: Paths = None,
    top: Top = 10,
    mode: InMode = Mode.auto,
    by: OfThese = By.auto,
) -> None:
    """Order files, or the passages of one, by how well they answer a question."""
    from agentctx.workflows.strategies.rank import Rank

    if question is None and not options.resume:
        raise ConfigError("a question is missing", hint="agentctx rank QUESTION [PATH]...")
    if options.strategy not in (None, "rank"):
        raise ConfigError(
            f"rank is a strategy itself, not one for {options.strategy}", hint="leave out --strategy"
        )
    ranking = Rank(top=top, mode=mode.value, by=by.value)
    execute(Job("rank", "ask", paths or (), question, strategy=ranking), options)
