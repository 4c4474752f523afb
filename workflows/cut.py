"""Cut the input into reads: named parts, chunks inside a part, and packs of small chunks read in one call.

Chunks never cross a part, and a pack holds neighbours of one part only, so what a read found belongs to a
file or chapter by construction. Every prompt is rendered and counted here, before anything is spent; if one
is over the window, the whole input is cut finer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Document, Span
from agentctx.workflows.conclude import Covered
from agentctx.workflows.roles import Role
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST, pack, split
from agentctx.workflows.state import Part, State

# A cut that does not fit is retried with chunks this much smaller.
FINER = 0.85


@dataclass(frozen=True, slots=True)
class Read:
    """One call: the chunks it reads (indices into `Cut.chunks`), their part, its prompt's tokens."""

    part: int
    chunks: tuple[int, ...]
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The whole input as reads."""

    parts: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    reads: tuple[Read, ...]
    chunk_tokens: int

    def pieces(self, scope: Scope, read: Read) -> list[tuple[str, str]]:
        """The (label, text) pieces that the call shows."""
        return [(scope.label(self.chunks[i].span), scope.text(self.chunks[i].span)) for i in read.chunks]

    def covered(self, state: State) -> Covered:
        """What became of the chunks: `reads` and `failures` of the state are by the number of the read."""

        failures = {n: f["kind"] for n, f in state.get("failures", {}).items() if n.isdigit()}
        failed = self.chunks_of(int(n) for n, kind in failures.items() if kind not in ("cancelled", "budget"))
        read = self.chunks_of(map(int, state.get("reads", {})))
        left_out = state.get("not_forwarded", 0)
        return Covered(self.chunks, read=read, failed=failed - read, not_forwarded=left_out)

    def chunks_of(self, reads: Iterable[int]) -> frozenset[int]:
        """The chunks of these reads."""
        return frozenset(i for n in reads for i in self.reads[n].chunks)


def cut(scope: Scope, role: Role, question: str, per: Part, limit: int | None = None, spare: int = 0) -> Cut:
    """Cut for `role`, asked `question`, with chunks of at most `limit` tokens, or as the window allows.

    A `limit` that is stated may pass the reliable window, never the context. `spare` tokens of every prompt
    stay free. Raises ConfigError if even the smallest chunk does not fit.
    """
    room = (scope.profile.context if limit else scope.profile.window) - role.max_output - spare
    empty = scope.prompt_tokens(role.render(question, [], scope.tag))
    label = max(
        scope.prompt_tokens(role.render(question, [(d.source, "")], scope.tag)) - empty
        for d in scope.documents.values()
    )
    chunk_tokens = min(limit or room, room - empty - label)
    while chunk_tokens >= LEAST:
        made = _cut(scope, role, question, per, chunk_tokens, label)
        if all(read.input_tokens <= room for read in made.reads):
            return made
        chunk_tokens = int(chunk_tokens * FINER)
    raise ConfigError(
        f"the role {role.name} needs {empty + label + role.max_output:,} tokens besides the text, "
        f"which leaves less than {LEAST} of the window of {scope.profile.window:,}",
        hint="ask a shorter question, or use a model with a larger window",
    )


def _cut(scope: Scope, role: Role, question: str, per: Part, chunk_tokens: int, label: int) -> Cut:
    names: list[str] = []
    chunks: list[Chunk] = []
    reads: list[Read] = []
    for name, spans in parts(scope, per):
        mine = [c for span in spans for c in _split_span(scope, span, chunk_tokens)]
        offset = len(chunks)
        chunks += mine
        at = offset
        for group in pack(mine, chunk_tokens + label, label_tokens=label):
            indices = tuple(range(at, at + len(group)))
            at += len(group)
            pieces = [(scope.label(c.span), scope.text(c.span)) for c in group]
            tokens = scope.prompt_tokens(role.render(question, pieces, scope.tag))
            reads.append(Read(len(names), indices, tokens))
        names.append(name)
    return Cut(tuple(names), tuple(chunks), tuple(reads), chunk_tokens)


def parts(scope: Scope, per: Part) -> list[tuple[str, list[Span]]]:
    """The named parts of the input: all of it, each file, or each chapter of each file."""
    documents = list(scope.documents.values())
    if per == "all":
        return [("", [Span(d.id, 0, len(d.text)) for d in documents])]
    if per == "file":
        return [(d.source, [Span(d.id, 0, len(d.text))]) for d in documents]
    return [part for d in documents for part in _chapters(d)]


def _chapters(document: Document) -> list[tuple[str, list[Span]]]:
    """The stretches between top-level headings or chapters; the text before the first is its own part."""
    marks = _top_level(document)
    starts = [(0, document.source)] if not marks or marks[0][0] > 0 else []
    starts += [(start, f"{document.source}: {name}") for start, name in marks]
    ends = [start for start, _ in starts[1:]] + [len(document.text)]
    return [
        (name, [Span(document.id, start, end)])
        for (start, name), end in zip(starts, ends, strict=True)
        if document.text[start:end].strip()
    ]


def _top_level(document: Document) -> list[tuple[int, str]]:
    chapters = [(x.start, str(x.value)) for x in document.locators if x.kind == "chapter"]
    if chapters:
        return chapters
    headings = [(x.start, str(x.value)) for x in document.locators if x.kind == "heading"]
    if not headings:
        return []
    # A heading's value is its path, "Part > Section"; a lone title above everything is no division.
    for depth in range(1, max(name.count(" > ") for _, name in headings) + 2):
        level = [(start, name) for start, name in headings if name.count(" > ") < depth]
        if len(level) > 1:
            return level
    return headings


def _split_span(scope: Scope, span: Span, limit: int) -> Sequence[Chunk]:
    document = scope.documents[span.document_id]
    if span.start == 0 and span.end == len(document.text):
        return scope.keep((span, limit), lambda: split(document, limit, scope.counter))

    def inner() -> list[Chunk]:
        found = split(Document.of(document.text[span.start : span.end]), limit, scope.counter)
        return [
            Chunk(Span(document.id, span.start + c.span.start, span.start + c.span.end), c.tokens)
            for c in found
        ]

    return scope.keep((span, limit), inner)
