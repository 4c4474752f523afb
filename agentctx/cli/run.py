"""One run from its flags to its exit code: open the sources, plan, run, show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn

import typer

from agentctx.cli import exits
from agentctx.cli.options import Options, OutputOptions
from agentctx.cli.output import Output, claim_stdout
from agentctx.cli.signals import stopping
from agentctx.cli.sources import selection_of, sources_of
from agentctx.cli.startup import collector_resting
from agentctx.memory.errors import AgentctxError, ConfigError, InputError

if TYPE_CHECKING:
    from agentctx.api import Context, Stop
    from agentctx.asked import Kind
    from agentctx.memory.selection import Selection
    from agentctx.memory.types import Answer, Budget
    from agentctx.settings import Settings
    from agentctx.workflows.frame import Strategy


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked for, and of what."""

    command: str
    task: Literal["ask", "summarize"]
    paths: Sequence[str]
    question: str | None = None  # of a summary: what to look at
    per: Literal["all", "file", "chapter"] = "all"
    kind: Kind = "search"
    labels: Sequence[str] = ()
    strategy: Strategy | None = None  # None: as the settings say


Body = Callable[["Context", "Settings", Output, "Stop"], int]


def execute(job: Job, options: Options, body: Body | None = None) -> None:
    """Run a job, or show its plan; ends the command with its exit code. `body` does it, once all is open."""
    from agentctx.settings import Settings

    _one_form(options)
    settings = Settings.load(options.flags(), options.config)
    settings.export_key()
    if options.resume:
        _resumed_alone(job, options)
        resume(options.resume, job.command, options, offline=settings.offline, budget=options.limits())
    selection = selection_of(options)
    sources = sources_of(job.paths, options, selection)
    with claim_stdout() as data:
        output = Output(job.command, options, data)
        code = _guarded(
            output, lambda stop: _run(job, options, settings, (sources, selection), output, stop, body)
        )
    raise typer.Exit(code)


def resume(
    run_id: str, command: str, options: OutputOptions, *, offline: bool, budget: Budget | None = None
) -> NoReturn:
    """Finish a run that was stopped, with the limits of `budget` instead of its own; ends the command with
    its exit code.
    """
    _one_form(options)

    def body(stop: Stop) -> int:
        from agentctx.api import Context

        with stopping(stop):
            answer = Context.resume(
                run_id,
                budget=budget,
                offline=offline,
                stop=stop,
                on_event=output.event,
                progress=output.progress.stage,
            )
        return _shown(answer, output)

    with claim_stdout() as data:
        output = Output(command, options, data)
        code = _guarded(output, body)
    raise typer.Exit(code)


def _resumed_alone(job: Job, options: Options) -> None:
    """A run brings its question, sources and model along: what would be ignored is refused."""
    blank = Job("", job.task, ())
    asked = ("question", "paths", "per", "kind", "labels")
    said = [name for name in asked if getattr(job, name) != getattr(blank, name)]
    said += [f"--{name.replace('_', '-')}" for name in options.own()]
    if said:
        raise ConfigError(
            f"--resume takes up a run as it was asked: {said[0]} cannot be given with it",
            hint="leave it out; limits, forms of output and --offline can be given",
        )


def _guarded(output: Output, body: Callable[[Stop], int]) -> int:
    """Run `body`; a typed error is shown in the form that was asked for and becomes its exit code."""
    from agentctx.api import Stop

    stop = Stop()

    def on_broken() -> None:
        stop.request("closed pipe")
        stop.request("closed pipe")  # nobody reads: do not even finish

    output.on_broken = on_broken
    try:
        code = body(stop)
    except AgentctxError as error:
        output.failure(error)
        code = exits.STOPPED.get(stop.reason or "", exits.of_error(error))
    finally:
        output.progress.clear()
    return exits.CLOSED_PIPE if output.broken else code


def _run(
    job: Job,
    options: Options,
    settings: Settings,
    sources: tuple[list[str], Selection],
    output: Output,
    stop: Stop,
    body: Body | None,
) -> int:
    with collector_resting():
        context = _open(sources, settings, output)
    output.profile, output.resumable = context.model.profile, not settings.ephemeral
    skipped = context.corpus.skipped
    if options.strict_inputs and skipped:
        first = skipped[0]
        message = f"{len(skipped)} sources cannot be read, the first: {first.source}: {first.message}"
        raise InputError(message, code=first.code, source=first.source, hint="leave out --strict-inputs")
    if body is not None:
        return body(context, settings, output, stop)
    return _once(job, options, context, settings, output, stop)


def _once(
    job: Job, options: Options, context: Context, settings: Settings, output: Output, stop: Stop
) -> int:
    """Plan or run it."""
    skipped = context.corpus.skipped
    strategy, budget = job.strategy or settings.strategy, settings.budget()
    if options.dry_run:
        plan = context.plan(
            job.question,
            task=job.task,
            per=job.per,
            kind=job.kind,
            labels=job.labels,
            strategy=strategy,
            budget=budget,
        )
        output.plan(plan, context.model.profile, (*skipped, *context.corpus.warnings))
        return exits.OK
    with stopping(stop):
        if job.task == "ask":
            answer = context.ask(
                job.question or "",
                kind=job.kind,
                labels=job.labels,
                strategy=strategy,
                budget=budget,
                run_id=options.run_id,
                stop=stop,
                on_event=output.event,
            )
        else:
            answer = context.summarize(
                job.question,
                per=job.per,
                strategy=strategy,
                budget=budget,
                run_id=options.run_id,
                stop=stop,
                on_event=output.event,
            )
    return _shown(answer, output)


def _open(sources: tuple[list[str], Selection], settings: Settings, output: Output) -> Context:
    from agentctx.api import Context

    paths, selection = sources
    return Context.open(
        paths,
        model=settings.model,
        base_url=settings.base_url,
        window=settings.window,
        embed=settings.embed,
        **settings.local(),
        selection=selection,
        stdin=sys.stdin.buffer if sys.stdin and "-" in paths else None,
        offline=settings.offline,
        ephemeral=settings.ephemeral,
        kv_bytes=settings.kv_bytes,
        memory_bytes=settings.memory_bytes,
        concurrency=settings.concurrency,
        progress=output.progress.stage,
    )


def _shown(answer: Answer, output: Output) -> int:
    output.answer(answer)
    return exits.of_answer(answer, require_citations=output.options.require_citations)


def _one_form(options: OutputOptions) -> None:
    if options.json and options.stream:
        raise ConfigError("--json and --stream exclude each other", hint="choose one")
