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
    fix: Annotated[
        bool, typer.Option("--fix", help="Put damaged caches aside; they are made again when needed.")
    ] = False,
    json: Json = False,
) -> None:
    """Check versions, folders, stores, models and environment; exit 1 if something is wrong."""
    from agentctx import doctor as clinic

    with claim_stdout():  # libraries that are asked for their version may print
        checks = clinic.examine(Paths.default(), endpoints=endpoints)
        fixed = clinic.fix(checks) if fix else []
        if fixed:
            checks = clinic.examine(Paths.default(), endpoints=endpoints)
    lines = [f"put aside: {path}" for path in fixed]
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        if not check.ok:
            lines.append(f"      {check.remedy}")
    ok = all(check.ok for check in checks)
    found = {"ok": ok, "fixed": fixed, "checks": [asdict(check) for check in checks]}
    show(found, lines, "doctor", as_json=json)
    raise typer.Exit(0 if ok else 1)
