"""The attention methods by name. A new one is a file and a line here; a class is imported when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.runtime.methods.dense import Dense

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense:Dense",
        "quest": "quest:Quest",
        "mean": "mean:Mean",
        "adamas": "adamas:Adamas",
        "streaming": "streaming:Streaming",
        "lambda": "lminfinite:Lambda",
        "ladder": "ladder:Ladder",
        "selfextend": "selfextend:SelfExtend",
        "ropescale": "ropescale:RopeScale",
        "triangle": "triangle:Triangle",
        "blocktopk": "blocktopk:BlockTopK",
        "flex": "flexprefill:FlexPrefill",
    }
)
EVICTORS: Mapping[str, str] = MappingProxyType(  # these read like dense, and ask a part of what was read
    {
        "snap": "snap:Snap",
        "kvzip": "kvzip:KVZip",
        "expected": "expected:Expected",
        "keydiff": "keystats:KeyDiff",
        "lagkv": "keystats:LagKV",
    }
)
ANCHORS: Mapping[str, str] = MappingProxyType({"random": "random:Random"})  # to be beaten, not to be used
EVICTING_ANCHORS: Mapping[str, str] = MappingProxyType({"randomtokens": "randomtokens:RandomTokens"})
AUTO = "dense"  # for a model that no grid says more of, see `auto.py`


def place_of(text: str) -> str:
    """Where the class of the method is that `text` begins with; imports nothing.

    Raises ConfigError for an unknown name.
    """
    first, _, inner = text.partition("+")
    if inner:
        place_of(inner)
    name = first.partition(":")[0]
    known = {**METHODS, **EVICTORS}
    place = {**known, **ANCHORS, **EVICTING_ANCHORS}.get(AUTO if name == "auto" else name)
    if place is None:
        raise ConfigError(f"there is no attention method {name!r}", hint=f"known: auto, {', '.join(known)}")
    return place


def method(text: str) -> Dense:
    """The method that `NAME` or `NAME:key=value,key=value` describes; "auto" chooses.

    `A+B` is A with what it leaves open done by B: `ropescale:factor=4+quest`. Raises ConfigError for an
    unknown name or parameter, a value out of range, or methods that cannot be combined.
    """
    text, _, inner = text.partition("+")
    module, _, title = place_of(text).partition(":")
    name, _, options = text.partition(":")
    kind: type[Dense] = getattr(import_module(f"agentctx.runtime.methods.{module}"), title)
    defaults = {field.name: field.default for field in fields(kind)}
    known: dict[str, Any] = {
        key: value for key, value in defaults.items() if isinstance(value, int | float | str)
    }
    values: dict[str, float | str] = {}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ConfigError(f"{name} has no parameter {key!r}", hint=f"known: {', '.join(known) or 'none'}")
        try:
            values[key] = type(known[key])(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {key} is {value!r}", hint=f"a number like {known[key]}") from error
    return kind(**values).over(method(inner)) if inner else kind(**values)
