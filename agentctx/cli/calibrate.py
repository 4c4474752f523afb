"""`agentctx calibrate`: find the heads of a local model that retrieve, and how much it reads well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.cli.progress import Progress
from agentctx.paths import Paths


def calibrate(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file or a hub id.")] = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of .txt files to hide facts in; else the texts are made up.", metavar="FOLDER"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the facts and where they stand.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write it there instead.", metavar="FILE")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    json: Json = False,
) -> None:
    """Find the attention heads of MODEL that retrieve, and how long a text it still reads well.

    Takes minutes: it reads texts with made-up facts and asks for them. The result is kept for every later
    use of the model.
    """
    from agentctx.models.calibration import calibration_file
    from agentctx.reading.calibrate import calibrate
    from agentctx.reading.engine import Engine

    paths = Paths.default()
    progress = Progress(enabled=sys.stderr.isatty())
    try:
        engine = Engine.load(model, paths=paths, kv_bytes=0, offline=offline, progress=progress.stage)
        found = calibrate(engine, data=data, seed=seed, say=progress.stage)
    finally:
        progress.clear()
    file = out or calibration_file(paths.calibration, engine.weights.content)
    found.write(file)
    heads = ", ".join(f"{layer}.{head}" for layer, head in found.heads)
    recall = ", ".join(f"{share:.0%} at {tokens:,}" for tokens, share in found.recall.items())
    lines = [
        f"heads (layer.head): {heads}",
        f"right sentence first for {found.first:.0%} of {found.questions} questions that chose no head "
        f"(all heads of the middle layers: {found.first_middle:.0%})",
        f"facts named when asked, by tokens of the text: {recall or 'not measured, the window is too small'}",
        f"reliable window: {f'{found.reliable:,} tokens' if found.reliable else 'shorter than any measured'}",
        f"kept in {file}",
    ]
    result = {
        "model": found.model,
        "heads": found.heads,
        "router_layers": found.router_layers,
        "first": found.first,
        "first_middle": found.first_middle,
        "recall": found.recall,
        "reliable": found.reliable,
        "file": str(file),
    }
    show(result, lines, "calibrate", as_json=json)
