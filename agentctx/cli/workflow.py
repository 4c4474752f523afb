"""`agentctx workflow list`, `validate`, `draw`, `plan`, `run`, `schema`: workflows in YAML files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentctx.cli.options import Json, Options, Paths, expand
from agentctx.cli.output import show
from agentctx.cli.run import Job, execute
from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.workflows.definition.strategy import Definition

app = typer.Typer(help="Workflows of your own, stated in a YAML file.")
File = Annotated[str, typer.Argument(metavar="FILE", help="A workflow file.", show_default=False)]
Question = Annotated[
    str | None, typer.Option(help="What to find out, where the file does not say.", metavar="TEXT")
]


@app.command("list")
def list_(json: Json = False) -> None:
    """What a file may name: node types, and strategies to run inside."""
    from agentctx.cli.render import columns
    from agentctx.workflows.definition.table import TYPES, installed, node_type
    from agentctx.workflows.registry import STRATEGIES

    others = installed()
    types = {name: " ".join((node_type(name).params.__doc__ or "").split()) for name in TYPES}
    rows = [*types.items(), *((name, f"of the package {point.value}") for name, point in others.items())]
    lines = columns([("node type", ""), *rows])
    lines += ["", "strategies, for a node of type workflow: " + ", ".join(STRATEGIES)]
    fields = {"types": dict(rows), "strategies": list(STRATEGIES)}
    show(fields, lines, "workflow list", as_json=json)


@app.command("validate")
def validate(file: File, json: Json = False) -> None:
    """Check a file completely; nothing is run. Exit code 2 names the line, the key and the remedy."""
    opened = _open(file)
    opened.graph().compile()
    sites = opened.wiring.sites
    fields = {
        "name": opened.name,
        "nodes": {name: site.node.type for name, site in sites.items()},
        "depth": opened.depth,
        "question": opened.question,
    }
    show(fields, [f"{file}: {opened.name}, {len(sites)} nodes, is right"], "workflow validate", as_json=json)


@app.command("draw")
def draw(file: File) -> None:
    """Print the graph as Mermaid text."""
    print(_open(file).graph().compile().get_graph().draw_mermaid(), end="")


@app.command("plan")
@expand
def plan(options: Options, file: File, paths: Paths = None, question: Question = None) -> None:
    """What a run of the file would cost at most, without a model call."""
    _execute("workflow plan", file, paths, question, replace(options, dry_run=True, resume=None))


@app.command("run")
@expand
def run(options: Options, file: File, paths: Paths = None, question: Question = None) -> None:
    """Run a file over sources."""
    _execute("workflow run", file, paths, question, options)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of workflow files, for editors."""
    path = Path(__file__).parent.parent / "schemas" / "workflow.json"
    print(path.read_text(encoding="utf-8"), end="")


def _open(file: str) -> Definition:
    from agentctx.workflows.definition.folder import open_definition

    return open_definition(file)


def _execute(command: str, file: str, paths: Paths, question: str | None, options: Options) -> None:
    if options.strategy is not None:
        raise ConfigError("the file is the strategy", hint="leave out --strategy")
    opened = _open(file)
    asked = question or (None if options.resume else opened.question)
    if asked is None and not options.resume:
        raise ConfigError(f"{file} brings no question", hint="--question TEXT")
    execute(Job(command, "ask", paths or (), asked, strategy=opened), options)
