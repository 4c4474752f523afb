"""Read a workflow file: YAML of plain values, nothing else, and where in the text each value stands.

A file may come from anyone. So its text is bounded before it is parsed; anchors, aliases, tags, merge keys,
duplicate keys and deep nesting are refused while it is parsed; and no value is ever evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from agentctx.memory.errors import ConfigError

MOST_BYTES = 256_000
DEEPEST = 16  # levels of nesting; a workflow has six
_PLAIN = "write the value out"


@dataclass(frozen=True, eq=False)
class Source:
    """The values of a file and the places they stand at."""

    name: str
    data: Any
    root: yaml.Node | None

    def error(self, loc: Sequence[str | int], message: str, hint: str = "") -> ConfigError:
        """A ConfigError that names the line and the key. `loc` is the path of keys to the value."""
        node, line = self.root, 1
        for key in loc:
            line, node = _step(node, key, line)
        path = ".".join(map(str, loc))
        return ConfigError(f"{self.name}:{line}: {path + ': ' if path else ''}{message}", hint=hint)


def read_source(text: str, name: str) -> Source:
    """Parse the text of a file. Raises ConfigError with the line of what is wrong."""
    if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise ConfigError(
            f"{name} is larger than {MOST_BYTES // 1000} kB", hint="no workflow needs that much"
        )
    try:
        _refuse(text, name)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            _unique_keys(root, name)
            data = loader.construct_document(root) if root else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise ConfigError(f"{name}{line}: not valid YAML: {problem}", hint="correct the line") from None
    except (ValueError, OverflowError) as error:  # a number or date that Python cannot hold
        raise ConfigError(f"{name}: a value cannot be read: {error}", hint="put it in quotes") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}:1: a workflow is a mapping of keys", hint="begin with: version: 1")
    return Source(name, data, root)


def _refuse(text: str, name: str) -> None:
    """Look at every event of the parser before a single value is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{line}: anchors and aliases are not allowed", hint=_PLAIN)
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{line}: the tag {tag} is not allowed", hint=_PLAIN)
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
            raise ConfigError(f"{line}: merge keys are not allowed", hint=_PLAIN)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{line}: nested more than {DEEPEST} levels deep", hint="flatten it")


def _unique_keys(node: yaml.Node | None, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _unique_keys(item, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{name}:{line}: a key must be a word", hint="remove the brackets")
        if key.value in seen:
            raise ConfigError(
                f"{name}:{line}: the key {key.value!r} stands twice, first in line {seen[key.value]}",
                hint="remove one",
            )
        seen[key.value] = line
        _unique_keys(value, name)


def _step(node: yaml.Node | None, key: str | int, line: int) -> tuple[int, yaml.Node | None]:
    """The line and the node of `key` in `node`; where it is missing, those of the nearest that is there."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line + 1, node.value[key]
    return line, None if node is None or not isinstance(node, yaml.CollectionNode) else node
