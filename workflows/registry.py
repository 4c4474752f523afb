"""The strategies by name: the one table that feeds CLI choices, error texts and the conformance tests."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

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

    Raises ConfigError naming the known strategies, the known parameters, or what is wrong with a value.
    """
    places = STRATEGIES | UNLISTED
    if name not in places:
        raise ConfigError(f"there is no strategy {name!r}", hint=f"choose one of: {', '.join(STRATEGIES)}")
    module, attribute = places[name].split(":")
    made: type[Strategy] = getattr(import_module(module), attribute)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    for param in params:
        if param not in known:
            raise ConfigError(
                f"the strategy {name} has no parameter {param!r}",
                hint=f"it has: {', '.join(known)}" if known else "it has none",
            )
    try:
        return TypeAdapter(made).validate_python(params)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        given = f", not {first['input']!r:.80}" if first["loc"][0] in params else ""
        raise ConfigError(
            f"the strategy {name} has a wrong {first['loc'][0]}: {first['msg']}{given}",
            hint="it is made of a file: agentctx workflow run FILE" if name in UNLISTED else "correct it",
        ) from None


def build(name: str, **params: Any) -> Graph:
    """The strategy as an uncompiled LangGraph graph: `build("recursive", chunk_tokens=2000).compile()`."""
    return strategy(name, **params).graph()
