"""The JSON Schema of workflow files, for editors: `python -m agentctx.workflows.definition.export`."""

from __future__ import annotations

import json
from typing import Any

from agentctx.workflows.definition.schema import Workflow
from agentctx.workflows.definition.table import TYPES, node_type

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> str:
    """What ships as `agentctx/schemas/workflow.json`. `with` is described for each of our node types."""
    whole = Workflow.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = whole["$defs"]
    choices = []
    for name in TYPES:
        params = node_type(name).params.model_json_schema(by_alias=True)
        definitions |= params.pop("$defs", {})
        title = params["title"]
        definitions[title] = params
        choices.append(
            {
                "if": {"properties": {"type": {"const": name}}},
                "then": {"properties": {"with": {"$ref": f"#/$defs/{title}"}}},
            }
        )
    node = definitions["Node"]
    node["allOf"] = choices
    node["properties"]["type"]["examples"] = list(TYPES)
    return json.dumps({"$schema": DRAFT, **whole}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
