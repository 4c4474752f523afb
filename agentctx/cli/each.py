"""`agentctx map`, and what it shares with `agentctx ask --each`: one question, a row for each."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from agentctx.cli import exits
from agentctx.cli.options import Options, Paths, expand
from agentctx.cli.run import Job, execute
from agentctx.cli.signals import stopping
from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.api import Context, Stop
    from agentctx.cli.output import Output
    from agentctx.cli.render import Line
    from agentctx.each import Row
    from agentctx.settings import Settings

SHOWN = 60  # characters of an answer in a table


class Unit(StrEnum):
    """What each row is for."""

    file = "file"
    chunk = "chunk"


Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="What to ask of each.", show_default=False)
]
PerUnit = Annotated[Unit, typer.Option("--per", help="file or chunk.", metavar="NAME")]
ChunkTokens = Annotated[
    int | None, typer.Option(help="Of a chunk, at most.", metavar="N", show_default=False)
]


@expand
def map_sources(
    options: Options,
    question: Question = None,
    paths: Paths = None,
    per: PerUnit = Unit.file,
    chunk_tokens: ChunkTokens = None,
) -> None:
    """Ask the same of every file, or of every chunk, and show a table."""
    if question is None:
        raise ConfigError("a question is missing", hint="agentctx map QUESTION [PATH]...")
    ask_each(Job("map", "ask", paths or (), question), options, per.value, chunk_tokens, table=True)


def ask_each(job: Job, options: Options, per: str, chunk_tokens: int | None = None, *, table: bool) -> None:
    """Ask, or show the plan; rows are printed as they come, or as a `table`, or with --json as JSON Lines.

    Ends the command with its exit code: the highest of those that each row would have alone.
    """
    if options.resume or options.run_id:
        raise ConfigError(
            "several answers are not one run that has a name",
            hint="give the same command again: finished calls are not repeated",
        )

    def body(context: Context, settings: Settings, output: Output, stop: Stop) -> int:
        each = context.each(
            job.question or "",
            per="chunk" if per == "chunk" else "file",
            chunk_tokens=chunk_tokens,
            kind=job.kind,
            labels=job.labels,
            strategy=settings.strategy,
            budget=settings.budget(),
        )
        notices = (*context.corpus.skipped, *context.corpus.warnings)
        if options.dry_run:
            output.plan(each.plan(), context.model.profile, notices)
            return exits.OK
        output.notices(notices)
        tabled = table and not (options.json or options.stream)
        rows, code = [], exits.OK
        with stopping(stop):
            for row in each.rows(stop=stop, on_event=output.event):
                output.row(row, lines=None if table else row_lines(row))
                code = max(code, _code(row, options))
                rows += [row] if tabled else []
        if tabled:
            output.lines(table_lines(rows))
        return code

    execute(job, options, body)


def _code(row: Row, options: Options) -> int:
    if row.span is None:  # left out when the sources were opened; --strict-inputs ends before any is asked
        return exits.OK
    if row.answer is not None:
        return exits.of_answer(row.answer, require_citations=options.require_citations)
    assert row.error is not None
    return exits.STOPPED.get(row.error.code, exits.of_error(row.error))


def row_lines(row: Row) -> list[Line]:
    """A row as a block of text: its source, then the answer or the error."""
    from agentctx.cli.render import Line, answer_lines
    from agentctx.memory.clean import one_line

    lines = [Line(f"== {one_line(row.source)}", "bold")]
    if row.answer is not None:
        lines += answer_lines(row.answer, quiet=True)
    if row.error is not None:
        lines += [Line(text, "bold red") for text in exits.explain(row.error).splitlines()]
    return [*lines, Line("")]


def table_lines(rows: Iterable[Row]) -> list[Line]:
    """Rows as a table: where, what came of it, the beginning of the answer, and its first quote."""
    from agentctx.cli.render import Line, columns

    cells = [("source", "characters", "status", "answer", "cited")]
    for row in rows:
        place = f"{row.span.start}-{row.span.end}" if row.span else ""
        if row.answer is None:
            assert row.error is not None
            cells.append((row.source, place, "failed", row.error.message[:SHOWN], ""))
            continue
        supported = [c.quote for c in row.answer.citations if c.verdict == "supported"]
        said = " ".join(row.answer.text.split())[:SHOWN]
        quote = " ".join(supported[0].split())[:SHOWN] if supported else ""
        cells.append((row.source, place, row.answer.status, said, quote))
    return [Line(text) for text in columns(cells)]
