"""The node types by name: our own, and those of installed packages (entry points `agentctx.nodes`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from agentctx.memory.errors import ConfigError
from agentctx.workflows.definition.schema import near
from agentctx.workflows.definition.site import NodeType

GROUP = "agentctx.nodes"
TYPES: Mapping[str, str] = MappingProxyType(
    {
        "split": "symbolic:SPLIT_TYPE",
        "filter": "symbolic:FILTER_TYPE",
        "select": "symbolic:SELECT_TYPE",
        "read": "neural:READ_TYPE",
        "reduce": "neural:REDUCE_TYPE",
        "merge": "symbolic:MERGE_TYPE",
        "vote": "symbolic:VOTE_TYPE",
        "list": "symbolic:LIST_TYPE",
        "answer": "neural:ANSWER_TYPE",
        "workflow": "nested:WORKFLOW_TYPE",
        "definition": "nested:DEFINITION_TYPE",
    }
)


def installed() -> dict[str, EntryPoint]:
    """The types that other packages bring. One of our names cannot be taken."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in TYPES}


def node_type(name: str) -> NodeType:
    """The type of that name. Raises ConfigError for an unknown one, or one that cannot be loaded."""
    if name in TYPES:
        module, _, attribute = TYPES[name].partition(":")
        found: NodeType = getattr(import_module(f"agentctx.workflows.definition.{module}"), attribute)
        return found
    others = installed()
    if name not in others:
        raise ConfigError(f"there is no node type {name!r}", hint=near(name, [*TYPES, *others]))
    try:
        loaded = others[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the node type {name!r} of {others[name].value} cannot be loaded: {error}",
            hint="repair or remove that package",
        ) from error
    if not isinstance(loaded, NodeType):
        raise ConfigError(
            f"{others[name].value} is no NodeType", hint=f"the entry point {GROUP} must name a NodeType"
        )
    return loaded
