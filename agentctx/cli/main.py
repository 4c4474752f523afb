"""The command line: the commands, and the one place where an error becomes an exit code.

Commands import what they need inside their bodies, so that `--help` costs no torch and no LangGraph.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import TracebackType
from typing import Annotated, Any

import typer

from agentctx import __version__
from agentctx.cli import (
    ask,
    bench,
    calibrate,
    config,
    doctor,
    each,
    exits,
    index,
    kv,
    models,
    rank,
    runs,
    trace,
    workflow,
)
from agentctx.memory.errors import AgentctxError, ConfigError

# typer keeps its copy of click private; a usage error is what a bad parameter is a case of.
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(name="agentctx", pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command("ask")(ask.ask)
app.command("summarize")(ask.summarize)
app.command("rank")(rank.rank)
app.command("map")(each.map_sources)
app.add_typer(ask.plan, name="plan")
app.add_typer(workflow.app, name="workflow")
app.add_typer(models.app, name="models")
app.command("calibrate")(calibrate.calibrate)
app.add_typer(kv.app, name="kv")
app.add_typer(index.app, name="index")
app.add_typer(bench.app, name="bench")
app.add_typer(runs.app, name="runs")
app.add_typer(trace.app, name="trace")
app.add_typer(config.app, name="config")
app.command("paths")(config.show_paths)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print it.")] = False
) -> None:
    """Answers over text far larger than a model's window, with citations checked by code."""
    if version:
        typer.echo(f"agentctx {__version__}")
    elif context.invoked_subcommand is None:
        with redirect_stdout(sys.stderr):
            print(context.get_help())
        raise typer.Exit(exits.USAGE)


def main() -> None:
    """The entry point of the command `agentctx`."""
    os.umask(0o077)  # what is kept holds document text: for this user only
    sys.excepthook = _report_bug
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.TERMINATED))
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code. A bug passes through, to the interpreter."""
    try:
        code = _invoke(args)
        sys.stdout.flush()
    except AgentctxError as error:
        return _fail(args, error, exits.of_error(error))
    except UsageError as error:
        hint = f"{error.ctx.command_path if error.ctx else 'agentctx'} --help"
        return _fail(args, ConfigError(error.format_message(), code="usage", hint=hint), exits.USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(args, AgentctxError("interrupted", code="interrupted"), exits.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        return exits.CLOSED_PIPE
    return code


def _invoke(args: Sequence[str]) -> int:
    if "_AGENTCTX_COMPLETE" in os.environ:
        app(args=args, prog_name="agentctx")
    command = typer.main.get_command(app)
    try:
        with command.make_context("agentctx", list(args)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return exits.OK


def _fail(args: Sequence[str], error: AgentctxError, code: int) -> int:
    """Say why on stderr, and as an object on stdout if one was promised."""
    if "--json" in args or "--stream" in args:
        from agentctx.result import failure

        command = next((arg for arg in args if not arg.startswith("-")), "")
        print(failure(error, command).model_dump_json(), flush=True)
    print(exits.explain(error), file=sys.stderr)
    return code


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For what nobody expected: its type here, the rest in a file, because messages may hold secrets."""
    import logging
    from logging.handlers import RotatingFileHandler

    from agentctx.paths import Paths

    path = Paths.default().logs / "errors.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=5_000_000, backupCount=4, encoding="utf-8")
    except OSError as unwritable:
        hint = f"details could not be written to {path}: {unwritable.strerror}"
    else:
        record = logging.LogRecord("agentctx", logging.ERROR, "", 0, "unexpected", None, (kind, error, trace))
        handler.handle(record)
        handler.close()
        hint = f"details are in {path}"
    bug = AgentctxError(f"{kind.__name__}, a bug in agentctx", code="internal", hint=hint)
    _fail(sys.argv[1:], bug, exits.FAILURE)
