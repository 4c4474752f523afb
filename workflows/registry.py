"""The strategies by name: the one table that feeds CLI choices, error texts and the conformance tests."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.workflows.frame import Graph, Strategy

STRATEGIES = {
    "auto": "agentctx.workflows.strategies.auto:Auto",
    "direct": "agentctx.workflows.strategies.direct:Direct",
    "spans": "agentctx.workflows.strategies.spans:Spans",
    "kv_retrieval": "agentctx.workflows.strategies.kv_retrieval:KVRetrieval",
    "lexical": "agentctx.workflows.strategies.lexical:Lexical",
    "rank": "agentctx.workflows.strategies.rank:Rank",
    "reread": "agentctx.workflows.strategies.reread:Reread",
    "map_reduce": "agentctx.workflows.strategies.map_reduce:MapReduce",
    "search": "agentctx.workflows.strategies.search:Search",
    "agents": "agentctx.workflows.strategies.agents:Agents",
    "fold": "agentctx.workflows.strategies.fold:Fold",
    "continue": "agentctx.workflows.strategies.continuation:Continuation",
    "experience": "agentctx.workflows.strategies.experience:Experience",
    "gist": "agentctx.workflows.strategies.gist:Gist",
    "recursive": "agentctx.workflows.strategies.recursive:Recursive",
}


# Made of a file (`workflows.definition`), not by name; a killed run is taken up through this.
UNLISTED = {"definition": "agentctx.workflows.definition.strategy:Definition"}


def strategy(name: str, **params: Any) -> Strategy:
    """The strategy of that name with these parameters.

    Raises ConfigError naming the known strategies or the known parameters.
    """
    places = STRATEGIES | UNLISTED
    if name not in places:
        raise ConfigError(f"there is no strategy {name!r}", hint=f"choose one of: {', '.join(STRATEGIES)}")
    module, attribute = places[name].split(":")
    made: type[Strategy] = getattr(import_module(module), attribute)
    known = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
    for param in params:
        if param not in known:
            raise ConfigError(
                f"the strategy {name} has no parameter {param!r}",
                hint=f"it has: {', '.join(known)}" if known else "it has none",
            )
    return made(**params)


def build(name: str, **params: Any) -> Graph:
    """The strategy as an uncompiled LangGraph graph: `build("recursive", chunk_tokens=2000).compile()`."""
    return strategy(name, **params).graph()
