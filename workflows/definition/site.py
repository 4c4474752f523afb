"""A node of a workflow where it stands: its parameters, what it reads and gives, and the texts it was given.

What flows are references, never texts: `chunks` are the numbers of reads of one cut, `records` are the ids of
what calls returned, by the number of their read, and an `answer` is the id of a draft with its spans.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from agentctx.memory.types import Stage
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.definition.schema import Form, Kind, Node
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope

if TYPE_CHECKING:
    from agentctx.workflows.frame import Strategy

Asked = tuple[Role, str]  # a role, and the question it is asked


@dataclass(frozen=True, slots=True)
class Folder:
    """The files that a workflow may name, as they were when it was opened, and the node's own."""

    files: Mapping[str, str]  # by path, relative to the folder of the file that was opened
    name: str
    chain: tuple[str, ...] = ()  # the files that lead to this one, from the outermost

    def path(self, given: str) -> str:
        """The path of a file that is named here. Raises ValueError for one outside the folder."""
        parts = PurePosixPath(given).parts
        if not parts or given.startswith(("/", "~")) or ".." in parts or "\\" in given or ":" in parts[0]:
            raise ValueError(f"{given!r} leads out of the workflow's folder")
        return str(PurePosixPath(self.name).parent / given)


@dataclass(frozen=True, slots=True)
class Result:
    """What one visit of a node gave."""

    value: Any
    failures: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # a read's number, or a word
    not_forwarded: int = 0
    inner: Mapping[str, Any] | None = None  # the last state of a strategy that ran inside
    shown: Sequence[int] = ()  # reads whose text was sent as it is
    taken: Sequence[int] = ()  # reads that a later visit of the same node leaves out
    weighed: Sequence[int] = ()  # reads that the Reader scored


Step = Callable[[RunContext, Mapping[str, Any]], Awaitable[Result]]  # the values that were read, by key


@dataclass(frozen=True)
class NodeType:
    """What `type` names. `build` makes the step, `ceiling` the cost of one visit at most.

    `takes` are the kinds that it can read, none for a node that reads nothing; `gives` is what it gives, None
    for the kind it reads. `schemas`: of the records it can read. A `mapped` type runs once for each item; its
    step gets the items of one batch under "items". `asks` says in which role it reads the text of chunks, so
    that they are cut to fit; `finishing`: its calls may use what is held back for finishing; `replies`: it
    answers the question in words, so an input that fits one call needs no other. `within`: the strategy that
    it runs inside.
    """

    params: type[Form]
    build: Callable[[Site], Step]
    ceiling: Callable[[Site, Scope], list[Stage]]
    takes: tuple[Kind, ...] = ()
    gives: Kind | None = "answer"
    schemas: tuple[str, ...] = ("facts", "points", "items")
    mapped: bool = False
    asks: Callable[[Site, Scope], Asked] | None = None
    needs: Callable[[Site], Tier] = lambda site: "reads"
    files: tuple[str, ...] = ()  # parameters that name a file
    finishing: bool = False
    replies: Callable[[Site], bool] = lambda site: False
    check: Callable[[Site], str] = lambda site: ""  # what is wrong with its place, or ""
    most: Callable[[Site], int | None] = lambda site: None  # items that it gives at most
    within: Callable[[Site], Strategy | None] = lambda site: None


@dataclass(frozen=True, slots=True)
class Port:
    """One value that a node reads: the key of the state, and the nodes that write it."""

    key: str
    kind: Kind
    writers: tuple[Site, ...]

    @property
    def origin(self) -> Site | None:
        """The split whose chunks these are, or were read."""
        return self.writers[0].origin

    def most(self, scope: Scope) -> int:
        """How many items it holds at most: records of several visits stand side by side."""
        origin = self.origin
        if not origin:
            return self.limit or 1
        reads = len(cut_of(origin, scope).reads)
        if self.limit is None:
            return reads
        visits = max(writer.visits for writer in self.writers) if self.kind == "records" else 1
        return min(reads, self.limit * visits)

    @property
    def limit(self) -> int | None:
        limits = [writer.limit for writer in self.writers]
        return None if None in limits else max((limit or 0) for limit in limits)


@dataclass(eq=False)
class Site:
    """A node where it stands. Filled in by `wiring`, then left alone."""

    name: str
    node: Node
    type: NodeType
    params: Any
    folder: Folder
    inner: Strategy | None = None
    kind: Kind = "answer"
    ports: tuple[Port, ...] = ()
    origin: Site | None = None
    readers: list[Site] = field(default_factory=list)  # of a split: who reads its chunks
    visits: int = 1
    item: str = ""  # of a mapped node: what its item is called

    def text(self, param: str) -> str:
        """The text of the file that a parameter names, or ""."""
        given = getattr(self.params, param)
        return self.folder.files[self.folder.path(given)] if given else ""

    @property
    def key(self) -> str:
        """Where it writes."""
        return self.node.writes or f"{self.name}_out"

    @property
    def limit(self) -> int | None:
        """Items that it gives at most, None: as many as the cut has."""
        own = self.type.most(self)
        if own is not None or not self.ports or self.type.takes == ():
            return own
        return self.ports[0].limit


def cut_of(split: Site, scope: Scope) -> Cut:
    """The reads of a split: cut so that each fits the longest prompt of those who read them."""

    def make() -> Cut:
        asked = [reader.type.asks(reader, scope) for reader in split.readers if reader.type.asks]
        role, question = max(asked, key=lambda one: _empty(scope, one))
        limit: int | None = split.params.chunk_tokens
        if limit is None and not scope.profile.writes:
            limit = split.params.least
        return cut(scope, role, question, split.params.per, limit)

    return scope.keep((split, "cut"), make)


def prompts(site: Site, scope: Scope) -> list[int]:
    """Tokens of the finished prompt of each read of a node that reads chunks one by one."""
    assert site.type.asks and site.origin
    role, question = site.type.asks(site, scope)
    made = cut_of(site.origin, scope)

    def make() -> list[int]:
        return [
            scope.prompt_tokens(role.render(question, made.pieces(scope, read), scope.tag))
            for read in made.reads
        ]

    return scope.keep((site, "prompts"), make)


def _empty(scope: Scope, asked: Asked) -> int:
    role, question = asked
    return scope.prompt_tokens(role.render(question, [], scope.tag)) + role.max_output
