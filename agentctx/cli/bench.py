"""`agentctx bench attention`, `speed`: what attention methods cost and lose, measured on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agentctx.cli.output import claim_stdout
from agentctx.paths import Paths

app = typer.Typer(help="Measure attention methods: what they lose, and how fast they are.")

Model = Annotated[str, typer.Option(help="smollm2, a folder, or a .gguf file.", metavar="MODEL")]
Out = Annotated[Path, typer.Option(help="Where results go.", metavar="DIR")]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw them too (matplotlib).")]


@app.command("attention")
def attention(
    model: Model = "smollm2",
    methods: Annotated[str, typer.Option(help="all, or names: quest,flex.")] = "all",
    budgets: Annotated[str, typer.Option(help="Tokens, or full.")] = "256,1024,4096",
    lengths: Annotated[str, typer.Option(help="Tokens: 2k,8k or 1k..32k.")] = "2k..8k",
    tasks: Annotated[str, typer.Option(help="agreement, ruler.")] = "agreement,ruler",
    data: Annotated[
        list[Path] | None, typer.Option(help="A folder with .txt files, and RULER's .jsonl.", metavar="DIR")
    ] = None,
    texts: Annotated[int, typer.Option(help="Texts at each length.", min=1)] = 4,
    items: Annotated[int, typer.Option(help="Tasks at each length.", min=1)] = 12,
    out: Out = Path("bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One short length, on this package's own code: minutes.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Print what each method declares.")] = False,
    plot: Plot = True,
) -> None:
    """Every method against dense attention: the same next token? how much likelihood lost? tasks solved?

    With the embedded model, alone on one core, a method and a budget take about half a minute at 2k, one at
    4k and three at 8k, half of it for 12 tasks; methods that change what is stored take twice that.
    """
    from agentctx.bench import cells

    if listed:
        from agentctx.bench.declared import declared

        _finish({"methods": declared(cells.parse_methods(methods))}, "bench attention")
        return
    from agentctx.bench import grid
    from agentctx.bench import plot as plots
    from agentctx.bench.peers import Place
    from agentctx.memory.errors import ConfigError

    if plot:
        plots.check()
    if not quick and not data:
        raise ConfigError("real text is measured: name a folder", hint="--data DIR, or --quick")
    with claim_stdout():
        weights = Place.find(model, Paths.default()).load()
        if quick:
            plan = grid.quick(weights.context, cells.parse_methods(methods))
        else:
            plan = grid.Plan(
                methods=cells.parse_methods(methods),
                budgets=cells.parse_budgets(budgets),
                lengths=cells.parse_lengths(lengths),
                tasks=[task.strip() for task in tasks.split(",")],
                data=data or (),
                texts=texts,
                items=items,
            )
        path = out / "grid.json"
        report = grid.run(weights, plan, path, _say)
        if plot:
            plots.grid(report, out / "grid.png")
    _finish({"grid": str(path), "cells": len(report["cells"])}, "bench attention")


@app.command("speed")
def speed(
    model: Model = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens: 2k,8k or 1k..32k.")] = "1k..8k",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Of each contestant.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="That count, besides those that warm up.", min=1)] = 9,
    max_minutes: Annotated[float, typer.Option(help="Begin nothing new after so many.")] = float("inf"),
    out: Out = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="1K tokens, three rounds: a minute or two.")] = False,
    plot: Plot = True,
) -> None:
    """Prefill and decode beside transformers and llama.cpp, in turns; bytes, peak, and a reading reopened.

    Alone on one core, the embedded model takes about 1 minute at 1k, 1 at 2k, 2 at 4k, 4 at 8k, 4 at 16k, 11
    at 32k and 2 for the rest in bfloat16, two to three times that in float32. What is done is not done again
    on the same day.
    """
    from agentctx.bench import cells
    from agentctx.bench import plot as plots
    from agentctx.bench import speed as measure
    from agentctx.memory.errors import ConfigError

    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}", hint="bfloat16 or float32")
    if plot:
        plots.check()
    wanted = [1024] if quick else cells.parse_lengths(lengths)
    kept = 1024 if quick else measure.RELOADED
    plan = measure.Plan(model, wanted, dtype, threads, 3 if quick else rounds, kept, max_minutes)
    with claim_stdout():
        path, report = measure.run(plan, out, _say)
        if plot and report["cases"]:
            plots.speed(report, path.with_suffix(".png"))
    fields = {"report": str(path), "cases": len(report["cases"]), "unfinished": report["unfinished"]}
    _finish(fields, "bench speed")


@app.command("auto")
def auto(
    report: Annotated[Path, typer.Argument(help="A grid.json.", metavar="GRID")],
    out: Annotated[Path, typer.Option(help="The table to write.", metavar="FILE")] = Path("auto.json"),
) -> None:
    """Write what `attention="auto"` follows: the methods that a grid shows to lose nothing and cost less."""
    from agentctx.bench.choice import chosen
    from agentctx.bench.grid import load
    from agentctx.memory.atomic import write_bytes

    table = chosen(load(report))
    write_bytes(out, (json.dumps(table, indent=1) + "\n").encode())
    _finish({"table": str(out), "models": table}, "bench auto")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _finish(fields: dict[str, Any], command: str) -> None:
    """The last line of stdout is one object."""
    print(json.dumps({"schema_version": 1, "command": command, **fields}))
