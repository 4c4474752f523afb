"""The attention methods by name. A new one is a file and a line here; a class is imported when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.runtime.methods.dense import Dense

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense:Dense",
        "quest": "quest:Quest",
        "mean": "mean:Mean",
        "adamas": "adamas:Adamas",
        "blocktopk": "blocktopk:BlockTopK",
    }
)


def method(text: str) -> Dense:
    """The method that `NAME` or `NAME:key=value,key=value` describes.

    Raises ConfigError for an unknown name or parameter, or a value out of range.
    """
    name, _, options = text.partition(":")
    if name not in METHODS:
        raise ConfigError(f"there is no attention method {name!r}", hint=f"known: {', '.join(METHODS)}")
    module, _, title = METHODS[name].partition(":")
    kind: type[Dense] = getattr(import_module(f"agentctx.runtime.methods.{module}"), title)
    given = {key: value for key, _, value in (part.partition("=") for part in options.split(",") if part)}
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError(
            f"{name} has no parameter {unknown[0]!r}", hint=f"known: {', '.join(known) or 'none'}"
        )
    values: dict[str, float] = {}
    for key, value in given.items():
        default = known[key].default
        try:
            values[key] = float(value) if isinstance(default, float) else int(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {key} is {value!r}", hint=f"a number like {default}") from error
    return kind(**values)
