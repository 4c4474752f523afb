"""`agentctx doctor`: does this machine have what agentctx needs?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import claim_stdout, show
from agentctx.paths import Paths


def doctor(
    endpoints: Annotated[bool, typer.Option("--endpoints", help="Also call the endpoint in use.")] = False,
    json: Json = False,
) -> None:
    """Check versions, folders, stores, models and environment; exit 1 if something is wrong."""
    from agentctx.doctor import examine

    with claim_stdout():  # libraries that are asked for their version may print
        checks = examine(Paths.default(), endpoints=endpoints)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        if not check.ok:
            lines.append(f"      {check.remedy}")
    ok = all(check.ok for check in checks)
    show({"ok": ok, "checks": [asdict(check) for check in checks]}, lines, "doctor", as_json=json)
    raise typer.Exit(0 if ok else 1)
