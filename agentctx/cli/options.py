"""The flags that commands share, each declared once.

Typer reads a command's flags from its signature. `expand` writes the fields of an options class into that
signature, so that `ask`, `summarize` and `plan` cannot drift apart and a command receives one value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

if TYPE_CHECKING:
    from agentctx.memory.types import Budget

MODEL, LIMITS, INPUT, OUTPUT, RUN = "Model", "Limits", "Input", "Output", "Run"

Paths = Annotated[
    list[str] | None,
    Argument(metavar="[PATH]...", help="Files and directories; '-' is standard input.", show_default=False),
]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How a run is shown."""

    json: Annotated[bool, Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False
    stream: Annotated[
        bool, Option("--stream", help="Print JSON Lines: events, then the result.", rich_help_panel=OUTPUT)
    ] = False
    require_citations: Annotated[
        bool,
        Option(
            "--require-citations", help="Exit with 4 if a claim is not supported.", rich_help_panel=OUTPUT
        ),
    ] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="The answer only.", rich_help_panel=OUTPUT)] = False
    verbose: Annotated[
        int,
        Option("--verbose", "-v", count=True, help="Say what happens, on stderr.", rich_help_panel=OUTPUT),
    ] = 0
    no_progress: Annotated[
        bool, Option("--no-progress", help="No progress line.", rich_help_panel=OUTPUT)
    ] = False
    offline: Annotated[
        bool | None, Option("--offline/--no-offline", help="Use nothing remote.", rich_help_panel=MODEL)
    ] = None


@dataclass(frozen=True, slots=True)
class Options(OutputOptions):
    """All flags of a command that reads sources with a model."""

    model: Annotated[
        str | None,
        Option(help="smollm2, a folder, a hub id, or openai:NAME.", rich_help_panel=MODEL, metavar="MODEL"),
    ] = None
    base_url: Annotated[
        str | None, Option(help="Of an OpenAI-compatible endpoint.", rich_help_panel=MODEL, metavar="URL")
    ] = None
    window: Annotated[int | None, Option(help="Tokens the model reads well.", rich_help_panel=MODEL)] = None
    attention: Annotated[
        str | None,
        Option(
            help="How a local model reads: auto, dense, quest:budget=2048, ...",
            rich_help_panel=MODEL,
            metavar="NAME[:K=V,...]",
        ),
    ] = None
    exact: Annotated[
        bool | None,
        Option(
            "--exact/--no-exact",
            help="Sparse attention drafts, dense attention decides every token.",
            rich_help_panel=MODEL,
        ),
    ] = None
    kv_dtype: Annotated[
        str | None,
        Option(
            help="How KV is held in memory: auto, int8 or int4, ...", rich_help_panel=MODEL, metavar="NAME"
        ),
    ] = None
    embed: Annotated[
        str | None,
        Option(
            help="Find passages by meaning too: auto, none, minilm, or a folder.",
            rich_help_panel=MODEL,
            metavar="NAME",
        ),
    ] = None
    strategy: Annotated[
        str | None, Option(help="auto, or one named in the README.", rich_help_panel=MODEL, metavar="NAME")
    ] = None
    max_calls: Annotated[int | None, Option(help="Model calls.", rich_help_panel=LIMITS)] = None
    max_input_tokens: Annotated[int | None, Option(rich_help_panel=LIMITS, help="Tokens read.")] = None
    max_output_tokens: Annotated[int | None, Option(rich_help_panel=LIMITS, help="Tokens written.")] = None
    max_seconds: Annotated[float | None, Option(rich_help_panel=LIMITS, help="Wall time.")] = None
    max_depth: Annotated[int | None, Option(rich_help_panel=LIMITS, help="Nested strategies.")] = None
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and stop.", rich_help_panel=LIMITS)] = (
        False
    )
    include: Annotated[
        list[str] | None, Option(help="Only these files.", rich_help_panel=INPUT, metavar="GLOB")
    ] = None
    exclude: Annotated[
        list[str] | None, Option(help="Not these files.", rich_help_panel=INPUT, metavar="GLOB")
    ] = None
    hidden: Annotated[bool, Option("--hidden", help="Also hidden files.", rich_help_panel=INPUT)] = False
    no_ignore: Annotated[
        bool, Option("--no-ignore", help="Also what .gitignore leaves out.", rich_help_panel=INPUT)
    ] = False
    encoding: Annotated[
        list[str] | None, Option(help="Such as '*.txt=cp1252'.", rich_help_panel=INPUT, metavar="GLOB=NAME")
    ] = None
    max_file_bytes: Annotated[int | None, Option(help="Skip larger files.", rich_help_panel=INPUT)] = None
    max_files: Annotated[int, Option(help="Of a directory.", rich_help_panel=INPUT)] = 10_000
    strict_inputs: Annotated[
        bool, Option("--strict-inputs", help="Exit with 3 if a source is skipped.", rich_help_panel=INPUT)
    ] = False
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.", rich_help_panel=INPUT)] = False
    run_id: Annotated[str | None, Option(help="Name the run.", rich_help_panel=RUN, metavar="ID")] = None
    resume: Annotated[
        str | None, Option(help="Finish a run that was stopped.", rich_help_panel=RUN, metavar="ID")
    ] = None
    ephemeral: Annotated[
        bool | None, Option("--ephemeral/--no-ephemeral", help="Keep nothing on disk.", rich_help_panel=RUN)
    ] = None
    config: Annotated[
        Path | None, Option(help="Read settings from this file only.", rich_help_panel=RUN, metavar="FILE")
    ] = None

    def flags(self) -> dict[str, Any]:
        """The flags that are settings."""
        from agentctx.settings import Settings

        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in Settings.model_fields
        }

    def limits(self) -> Budget:
        """The limits that are given as flags, those of the settings left out."""
        from agentctx.memory.types import Budget
        from agentctx.settings import LIMITS as NAMES

        return Budget(*(getattr(self, name) for name in NAMES))

    def own(self) -> list[str]:
        """The given flags that make a run what it is, not how far it goes or how it is shown."""
        from agentctx.settings import LIMITS as NAMES

        free = {*(field.name for field in fields(OutputOptions)), *NAMES, "resume", "config", "yes"}
        chosen = (field for field in fields(self) if field.name not in free)
        return [field.name for field in chosen if getattr(self, field.name) != field.default]


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` of a command by the fields of its class."""
    own = inspect.signature(command, eval_str=True)
    kind = own.parameters["options"].annotation
    shared = inspect.signature(kind, eval_str=True).parameters

    def call(**given: Any) -> None:
        options = kind(**{name: given.pop(name) for name in shared})
        command(**given, options=options)

    parameters = [p for name, p in own.parameters.items() if name != "options"] + [*shared.values()]
    signature = own.replace(parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
