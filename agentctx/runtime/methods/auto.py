"""What `attention="auto"` is for a model: read from a table that `agentctx bench auto` makes of a grid."""

from __future__ import annotations

import json
from importlib.resources import files

from agentctx.runtime.methods.table import AUTO


def automatic(model: str) -> str:
    """The attention of a model of the table by its name; dense for a model that was not measured."""
    table = json.loads(files("agentctx.runtime.methods").joinpath("auto.json").read_text(encoding="utf-8"))
    return str(table[model]["attention"]) if model in table else AUTO
