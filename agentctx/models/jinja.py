"""Chat templates: Jinja programs that come with weights, and are trusted as little.

They run in Jinja's immutable sandbox with what templates are written against: loop controls, trimmed blocks,
`raise_exception`, `strftime_now`, a `tojson` that does not escape for HTML, and `{% generation %}`, which
marks what a model said and here only holds its content. `dict` is not the class itself, through which a
template could reach Python's own objects, and no name that begins with an underscore can be set on a
`namespace`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Render = Callable[[Sequence[Mapping[str, str]]], str]


def compiled(source: str, specials: Mapping[str, str]) -> Render:
    """A function from turns `{"role", "content"}` to the prompt up to where the model speaks.

    `specials`: the tokens that templates name, such as `bos_token`. Raises jinja2.TemplateError for a
    template that cannot be compiled; the function does for a conversation that the template refuses.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **fields: dict(*args, **fields),
        "namespace": _Guarded,
    }
    template = environment.from_string(source)

    def render(turns: Sequence[Mapping[str, str]]) -> str:
        given = [dict(turn) for turn in turns]
        return template.render(
            {**specials, "messages": given, "tools": None, "documents": None, "add_generation_prompt": True}
        )

    return render


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Guarded(Namespace):
    def __init__(*args: Any, **fields: Any) -> None:  # `self` is a name that a template may set
        self, *rest = args
        given = dict(*rest, **fields)
        for name in given:
            _allowed(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _allowed(name)
        super().__setitem__(name, value)


def _allowed(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a template may not set {name!r} on a namespace")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
