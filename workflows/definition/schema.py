"""The form of a workflow file: names, numbers and short texts; no code, no expressions, no interpolation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentctx.memory.types import Budget
from agentctx.workflows.definition.file import Source

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
Kind = Literal["chunks", "records", "answer"]
START, END = "START", "END"


class Form(BaseModel):
    """Base of everything in a file: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


F = TypeVar("F", bound=Form)


class QuestionInput(Form):
    """A question that need not be asked, because the file brings one."""

    type: Literal["str"] = "str"
    default: str = Field(min_length=1, max_length=4000)


class Inputs(Form):
    """What a run is given."""

    question: Literal["str"] | QuestionInput = "str"
    sources: Literal["sources"] = "sources"


class Outputs(Form):
    """What a run gives."""

    answer: Literal["answer"] = "answer"


class StateKey(Form):
    """A named place for what nodes write. `append` joins what several visits write, `last` keeps the last."""

    type: Kind
    reducer: Literal["last", "append"] = "last"


class Retry(Form):
    """How often one call is sent at most, out of the run's pool of extra attempts."""

    attempts: int = Field(ge=1, le=3)


class Node(Form):
    """One step. `reads` are state keys or node names; left out: what the nodes before it gave."""

    type: str = Field(min_length=1, max_length=64)
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    reads: str | list[str] | None = None
    writes: Name | None = None
    retry: Retry | None = None
    cache: bool = True
    timeout: float | None = Field(None, gt=0, le=3600)
    defer: bool = False
    max_visits: int | None = Field(None, ge=1, le=100)


class Map(Form):
    """Run `node` once for each item of `over`; inside it the item is called by the name after `as`."""

    over: Name
    as_: Name = Field("item", alias="as")
    node: Name


class Match(Form):
    """Go where the field `path` of what the source gave says, by equality."""

    path: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$", max_length=120)]
    cases: dict[str | bool | int, str] = Field(min_length=1)
    default: str


class Edge(Form):
    """The way on from a node: to one, to several at once, to one for each item, or to one that fits."""

    source: str
    target: str | None = None
    targets: list[str] | None = Field(None, min_length=2)
    map: Map | None = None
    match: Match | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Edge:
        if sum(way is not None for way in (self.target, self.targets, self.map, self.match)) != 1:
            raise ValueError("an edge has exactly one of target, targets, map, match")
        return self

    def ends(self) -> list[str]:
        """Where it may lead."""
        if self.match:
            return list(dict.fromkeys([*self.match.cases.values(), self.match.default]))
        return [self.map.node] if self.map else self.targets or [str(self.target)]


class Limits(Form):
    """What a run of this file may cost at most; inside another file, that file's limits hold."""

    calls: int | None = Field(None, ge=1)
    input_tokens: int | None = Field(None, ge=1)
    output_tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)

    def budget(self) -> Budget:
        return Budget(self.calls, self.input_tokens, self.output_tokens, self.seconds)


class Workflow(Form):
    """A workflow as a file states it."""

    version: Literal[1]
    name: Name
    description: str = Field("", max_length=2000)
    input: Inputs = Inputs()
    output: Outputs = Outputs()
    state: dict[Name, StateKey] = Field(default_factory=dict)
    nodes: dict[Name, Node] = Field(min_length=1, max_length=64)
    edges: list[Edge] = Field(min_length=2, max_length=256)
    budget: Limits = Field(default_factory=lambda: Limits.model_validate({}))

    @property
    def question(self) -> str | None:
        """The question that the file brings, if it brings one."""
        return self.input.question.default if isinstance(self.input.question, QuestionInput) else None


def parsed(form: type[F], value: Any, source: Source, loc: Sequence[str | int] = ()) -> F:
    """The value in its form. Raises ConfigError with the line, the key and what would be right."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        # A misspelt key comes first: it explains why another one is missing.
        first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
        where = [*loc, *_written(value, first["loc"])]
        if first["type"] == "extra_forbidden":
            known = _known(form, first["loc"][:-1])
            raise source.error(where, "this key is not known", near(str(where[-1]), known)) from None
        if first["type"] == "missing":
            raise source.error(where, f"the key {first['loc'][-1]!r} is missing", "add it") from None
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], dict | list | Form) else f", got {first['input']!r:.80}"
        raise source.error(where, f"{message[:1].lower()}{message[1:]}{shown}", _way_out(first)) from None


def near(word: str, known: Iterable[str]) -> str:
    """The hint for a name that is not known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(names) or 'none'}"


def _written(value: Any, loc: tuple[str | int, ...]) -> list[str | int]:
    """The part of pydantic's path that stands in the file: without the names of unions and models."""
    path: list[str | int] = []
    for key in loc:
        known = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if known or (isinstance(value, dict) and key in value):
            path.append(key)
            value = value[key]
    return path


def _known(form: type[BaseModel], loc: Iterable[str | int]) -> list[str]:
    """The keys of the form at this path."""
    models = [form]
    for key in loc:
        inner = [m for model in models for m in _inside(model, key)]
        models = inner or models
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _inside(model: type[BaseModel], key: str | int) -> list[type[BaseModel]]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if key not in fields:
        return []
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [fields[str(key)].annotation]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            found.append(one)
        waiting += getattr(one, "__args__", ())
    return found


def _way_out(error: Any) -> str:
    if error["type"] in ("greater_than", "greater_than_equal"):
        return "raise it, or leave the key out"
    if error["type"] == "string_pattern_mismatch":
        return "use letters, digits and underscores, a letter first"
    return "see: agentctx workflow schema"
