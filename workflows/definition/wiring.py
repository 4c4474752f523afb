"""Check a workflow before anything is spent: names, kinds, edges, joins and cycles, each error with its line.

What comes out is every node at its site: what it reads, who writes that, how often it runs at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_type_hints

from agentctx.memory.errors import ConfigError
from agentctx.workflows.definition.file import Source, read_source
from agentctx.workflows.definition.flow import Flow
from agentctx.workflows.definition.schema import END, START, Edge, Kind, Map, Node, Workflow, near, parsed
from agentctx.workflows.definition.site import Folder, Port, Site
from agentctx.workflows.definition.state import DefinitionState
from agentctx.workflows.definition.table import node_type

FRAME = ("plan", "direct", "verify", "finish", START, END)  # nodes that every workflow has


@dataclass(frozen=True)
class Wiring:
    """A checked workflow. `sites` in the order of the file."""

    flow: Workflow
    sites: Mapping[str, Site]
    edges: Mapping[str, Edge]  # by source

    @property
    def entry(self) -> str:
        return str(self.edges[START].target)

    @cached_property
    def last(self) -> list[Site]:
        """The nodes that lead to the end, in the order of the file."""
        return [site for name, site in self.sites.items() if END in self.edges[name].ends()]


def wire(folder: Folder) -> Wiring:
    """Check the workflow that stands in `folder`. Raises ConfigError with line, key and remedy."""
    source = read_source(folder.files[folder.name], folder.name)
    if folder.name in folder.chain:
        path = " -> ".join([*folder.chain, folder.name])
        raise source.error((), f"the file runs itself: {path}", "remove one of the nodes of type definition")
    flow = parsed(Workflow, source.data, source)
    _Names(flow, source).check()
    edges = {edge.source: edge for edge in flow.edges}
    flowing = Flow(flow, edges, source)
    flowing.check()
    sites = {name: _site(name, node, source, folder) for name, node in flow.nodes.items()}
    _Ports(flow, edges, sites, source).connect()
    for name, site in sites.items():
        site.visits = flowing.visits(name)
        if wrong := site.type.check(site):
            raise source.error(("nodes", name), wrong, "see: agentctx workflow schema")
        if site.kind == "chunks" and site.origin is site and not site.readers:
            raise source.error(
                ("nodes", name), "no node reads its chunks", "add a node of type read or answer"
            )
    wiring = Wiring(flow, sites, edges)
    for site in wiring.last:
        if site.kind != "answer":
            raise source.error(
                ("nodes", site.name),
                f"it gives {site.kind} and leads to END; a run ends with an answer",
                "lead it to a node of type answer, list, reduce, merge or vote",
            )
    return wiring


@dataclass(frozen=True)
class _Names:
    flow: Workflow
    source: Source

    def check(self) -> None:
        """Each name is known, stands for one thing, and is none of ours."""
        taken = set(get_type_hints(DefinitionState))
        for name in self.flow.nodes:
            if name in taken or name in FRAME or name in self.flow.state:
                what = "a key of the state" if name in self.flow.state else "a name of the frame"
                raise self.source.error(
                    ("nodes", name), f"{name!r} is {what}", f"call it otherwise: {name}_it"
                )
        for key in self.flow.state:
            if key in taken or key.removesuffix("_out") in self.flow.nodes:
                raise self.source.error(
                    ("state", key), f"{key!r} is a key of the frame", f"call it otherwise: my_{key}"
                )
        for number, edge in enumerate(self.flow.edges):
            where = ("edges", number)
            if edge.source not in (START, *self.flow.nodes):
                self.unknown((*where, "source"), edge.source, [START, *self.flow.nodes])
            for end in edge.ends():
                if end not in (END, *self.flow.nodes):
                    self.unknown(where, end, [END, *self.flow.nodes])
        for name, node in self.flow.nodes.items():
            if node.writes and node.writes not in self.flow.state:
                self.unknown(("nodes", name, "writes"), node.writes, self.flow.state)

    def unknown(self, where: tuple[str | int, ...], name: str, known: Iterable[str]) -> None:
        raise self.source.error(where, f"there is no {name!r}", near(name, known))


def _site(name: str, node: Node, source: Source, folder: Folder) -> Site:
    try:
        kind = node_type(node.type)
    except ConfigError as error:
        raise source.error(("nodes", name, "type"), error.message, error.hint) from None
    params = parsed(kind.params, node.with_, source, ("nodes", name, "with"))
    site = Site(name, node, kind, params, folder)
    for param in kind.files:
        given = getattr(params, param)
        try:
            missing = given is not None and folder.path(given) not in folder.files
        except ValueError as error:
            raise source.error(("nodes", name, "with", param), str(error), "name a file beside it") from None
        if missing:
            raise source.error(("nodes", name, "with", param), f"there is no file {given!r}", "add it")
    try:
        site.inner = kind.within(site)
        if site.inner:
            site.inner.depth  # noqa: B018 - a file inside is checked here
    except ConfigError as error:
        raise source.error(("nodes", name, "with"), error.message, error.hint) from None
    return site


@dataclass(frozen=True)
class _Ports:
    """Resolves what each node reads."""

    flow: Workflow
    edges: Mapping[str, Edge]
    sites: Mapping[str, Site]
    source: Source

    def connect(self) -> None:
        for name, site in self.sites.items():
            site.kind = self.kind(name, ())
        for key, declared in self.flow.state.items():
            writers = self.writers(key)
            if not writers:
                raise self.source.error(("state", key), "no node writes it", "remove it, or add writes")
            if kinds := {site.kind for site in writers} - {declared.type}:
                raise self.source.error(
                    ("state", key, "type"),
                    f"{writers[0].name} writes {min(kinds)}, not {declared.type}",
                    f"type: {min(kinds)}",
                )
            self.reducer(key, writers)
        for name in self.sites:
            self.ports(name)
        for name, site in self.sites.items():
            site.origin = self.origin(name, ())
        for site in self.sites.values():
            self.fit(site)

    def reducer(self, key: str, writers: list[Site]) -> None:
        mapped = [site for site in writers if self.mapped(site.name)]
        if len(mapped) > 1:
            raise self.source.error(
                ("state", key),
                f"{mapped[0].name} and {mapped[1].name} write it; of what both read, one note would be kept",
                f"a key for each; reads: [{mapped[0].name}, {mapped[1].name}]",
            )
        if mapped and self.flow.state[key].reducer != "append":
            raise self.source.error(
                ("state", key), "a mapped node writes it, many times at once", "reducer: append"
            )
        if self.flow.state[key].type == "answer" and self.flow.state[key].reducer == "append":
            raise self.source.error(("state", key, "reducer"), "answers cannot be joined", "reducer: last")

    def mapped(self, name: str) -> Map | None:
        return next((edge.map for edge in self.edges.values() if edge.map and edge.map.node == name), None)

    def writers(self, key: str) -> list[Site]:
        return [site for site in self.sites.values() if site.key == key]

    def before(self, name: str) -> list[Site]:
        """The nodes that lead to this one."""
        return [self.sites[s] for s, edge in self.edges.items() if s != START and name in edge.ends()]

    def keys(self, name: str) -> list[str]:
        """The keys that a node reads, as the file says or by what leads to it."""
        site, over = self.sites[name], self.mapped(name)
        given = site.node.reads
        where = ("nodes", name, "reads")
        if over:
            if given not in (None, over.as_, [over.as_]):
                raise self.source.error(where, f"a mapped node reads its item, {over.as_!r}", "leave it out")
            return [self.resolved(over.over, ("edges",))]
        if not site.type.takes:
            if given is not None:
                raise self.source.error(where, f"the type {site.node.type} reads nothing", "leave it out")
            return []
        if given is not None:
            return [self.resolved(one, where) for one in ([given] if isinstance(given, str) else given)]
        able = [s for s in self.before(name) if self.kind(s.name, (name,)) in site.type.takes]
        return list(dict.fromkeys(s.key for s in able))

    def resolved(self, given: str, where: tuple[str | int, ...]) -> str:
        """The key of a state key or node."""
        if given in self.sites:
            return self.sites[given].key
        if given not in self.flow.state:
            raise self.source.error(
                where, f"there is no {given!r}", near(given, [*self.flow.state, *self.sites])
            )
        return given

    def kind(self, name: str, seen: tuple[str, ...]) -> Kind:
        site = self.sites[name]
        if site.type.gives:
            return site.type.gives
        if name in seen:
            return site.type.takes[0]
        given = site.node.reads if isinstance(site.node.reads, str) else ""
        if given in self.flow.state:
            return self.flow.state[given].type
        sources = [self.sites[given]] if given in self.sites else self.before(name)
        kinds = [self.kind(source.name, (*seen, name)) for source in sources]
        return next((kind for kind in kinds if kind in site.type.takes), site.type.takes[0])

    def ports(self, name: str) -> None:
        site = self.sites[name]
        over = self.mapped(name)
        if bool(over) != site.type.mapped:
            hint = "lead to it by map" if site.type.mapped else "lead to it by target"
            what = "reads one item at a time" if site.type.mapped else "reads everything at once"
            raise self.source.error(("nodes", name, "type"), f"the type {site.node.type} {what}", hint)
        site.item = over.as_ if over else ""
        keys = self.keys(name)
        if site.type.takes and not keys:
            raise self.source.error(
                ("nodes", name), f"it reads nothing; it can read {' or '.join(site.type.takes)}", "add reads"
            )
        site.ports = tuple(
            Port(key, writers[0].kind, tuple(writers)) for key in keys if (writers := self.writers(key))
        )
        for port in site.ports:
            if port.kind not in site.type.takes:
                raise self.source.error(
                    ("nodes", name, "reads"),
                    f"{port.key} holds {port.kind}; the type {site.node.type} reads "
                    f"{' or '.join(site.type.takes)}",
                    "read something else",
                )

    def origin(self, name: str, seen: tuple[str, ...]) -> Site | None:
        """The split whose chunks a node gives, or reads one by one."""
        site = self.sites[name]
        if site.type.gives == "chunks" and not site.type.takes:
            return site
        if site.kind == "answer" or name in seen or not site.ports:
            return None
        found = [self.origin(w.name, (*seen, name)) for port in site.ports for w in port.writers]
        return next((one for one in found if one), None)

    def fit(self, site: Site) -> None:
        """Chunks of one cut only, records of a form that the node can read; splits know their readers."""
        where = ("nodes", site.name)
        for port in site.ports:
            origins = {writer.origin.name for writer in port.writers if writer.origin}
            if len(origins) > 1 and port.kind != "answer":
                cuts = " and ".join(sorted(origins))
                raise self.source.error(
                    where, f"{port.key} holds {port.kind} of {cuts}", "use a key for each"
                )
            if port.kind == "chunks" and site.type.asks and port.origin and site not in port.origin.readers:
                port.origin.readers.append(site)
            for form in _forms(port, ()):
                if port.kind == "records" and form not in site.type.schemas:
                    raise self.source.error(
                        where,
                        f"it reads records of the schema {form}; the type {site.node.type} reads "
                        f"{', '.join(site.type.schemas)}",
                        "read with another schema",
                    )


def _forms(port: Port, seen: tuple[str, ...]) -> set[str]:
    """The schemas of the records that a port holds, through filters."""
    forms: set[str] = set()
    for writer in port.writers:
        if writer.name in seen:
            continue
        if hasattr(writer.params, "schema_"):
            forms.add(writer.params.schema_)
        else:
            for inner in writer.ports:
                forms |= _forms(inner, (*seen, writer.name))
    return forms
