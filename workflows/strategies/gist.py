"""A gist of every page, made once whatever is asked; then the pages that a question needs are opened.

    gist ×pages -> choose -> open -> answer          parallel
                   choose -> open -> choose …        sequential

Lee et al., "A Human-Inspired Reading Agent with Gist Memory of Very Long Contexts" (ReadAgent), arXiv
2402.09727. Gists do not depend on the question, so a second question makes no call for them. A gist only says
where to look: citations come from pages. Cost: one call a page, once; then one choice for each table of gists
that fits the window, or one for each page that is opened in turn; and one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Failure, Plan
from agentctx.workflows import cost
from agentctx.workflows.answering import Piece, answer_input, answer_pieces, answer_role
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.cut import Cut, cut
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import no_information
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import Record, State, TaskKind

LINE = 24  # tokens of a line of the table besides its gist: number, source, marks


class GistReply(Reply):
    """What a page is about."""

    example = MappingProxyType(
        {"gist": "in one or two sentences", "names": ("who and what",), "figures": ("numbers and dates",)}
    )

    gist: str = Field(default="", max_length=600)
    names: list[str] = Field(default_factory=list, max_length=12)
    figures: list[str] = Field(default_factory=list, max_length=12)


class PagesReply(Reply):
    """Which pages to open."""

    example = MappingProxyType({"pages": (3,), "enough": False})

    pages: list[int] = Field(default_factory=list, max_length=12)
    enough: bool = False


PAGE = Role(
    "page gist",
    1,
    "You shorten a page so that one can tell later what is on it: what it says in one or two sentences, the "
    "names and the figures that occur in it.",
    GistReply,
    160,
)
CHOOSE = Role(
    "choose pages",
    1,
    "You are shown short descriptions of the pages of a long source. Name the numbers of the pages that have "
    "to be read to answer the question, the most important first. enough says that the opened pages suffice.",
    PagesReply,
    80,
)


class GistState(State, total=False):
    """`opened`: pages in the order they were chosen."""

    opened: list[int]


@dataclass(frozen=True)
class Gist(Strategy):
    """At most `lookups` pages of `page_tokens` are opened; a gist is shown with at most `gist_tokens`."""

    name: ClassVar[str] = "gist"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search", "multi_hop")
    state: ClassVar[type[State]] = GistState
    page_tokens: int = 800
    gist_tokens: int = 120
    lookups: int = 5
    mode: Literal["parallel", "sequential"] = "parallel"

    def __post_init__(self) -> None:
        if self.mode not in ("parallel", "sequential"):
            raise ConfigError(f"mode must be parallel or sequential, got {self.mode!r}")
        if self.page_tokens < LEAST or self.gist_tokens < 8 or self.lookups < 1:
            raise ConfigError(f"page_tokens, gist_tokens or lookups is too small: {self}")

    def needs(self, scope: Scope) -> Tier:
        return "writes"

    def pages(self, scope: Scope) -> Cut:
        """The pages, each a read; never more than a quarter of the window, so that several can be opened."""
        limit = min(self.page_tokens, max(LEAST, scope.profile.window // 4))
        role = scope.role(PAGE)
        return scope.keep((self, "pages"), lambda: cut(scope, role, "", scope.task.per, limit))

    def tables(self, scope: Scope) -> list[range]:
        """Stretches of pages whose gists fit one call, in turn beside the pages that were opened."""
        window = scope.profile.window
        room = (window // 2 if self.mode == "sequential" else window * 9 // 10) - self._empty(scope)
        size = max(1, room // (self.gist_tokens + LINE))
        pages = len(self.pages(scope).reads)
        return [range(at, min(at + size, pages)) for at in range(0, pages, size)]

    def body_plan(self, scope: Scope) -> Plan:
        made, page, choose = self.pages(scope), scope.role(PAGE), scope.role(CHOOSE)
        inputs = [read.input_tokens for read in made.reads]
        choices = len(self.tables(scope)) * (self.lookups if self.mode == "sequential" else 1)
        window, (_, output) = scope.profile.window, answer_input(scope, [])
        stages = [
            cost.stage("gist", page.name, inputs, page.max_output, scope.profile),
            cost.stage(
                "choose",
                choose.name,
                [window - choose.max_output] * choices,
                choose.max_output,
                scope.profile,
            ),
            cost.stage("answer", answer_role(scope).name, [window - output], output, scope.profile),
        ]
        return cost.make_plan(
            self.name,
            {"pages": len(made.reads), **asdict(self)},
            stages,
            largest_input=max(window, *inputs),
            largest_output=max(page.max_output, output, choose.max_output),
            hold=stages[1].cost + stages[2].cost,
            coverage=1.0,
            supersteps=8 + self.lookups,
            assumptions=["gists are made once: a second question pays for its choice and its answer only"],
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "gist", self._gist)
        add_node(graph, "choose", self._choose)
        add_node(graph, "answer", self._answer)
        graph.add_edge("gist", "choose")
        graph.add_conditional_edges("choose", lambda state: state["route"], ["choose", "answer"])
        graph.add_edge("answer", "verify")
        return "gist"

    async def _gist(self, run: RunContext, state: GistState) -> dict[str, Any]:
        made, role = self.pages(run.scope), run.scope.role(PAGE)

        async def one(number: int) -> Record | Failure:
            result = await ask(run, role, "", made.pieces(run.scope, made.reads[number]))
            if isinstance(result, Record):
                run.see({"reads": {str(number): result.id}})
            return result

        results = await asyncio.gather(*(one(number) for number in range(len(made.reads))))
        return {
            "reads": {str(n): r.id for n, r in enumerate(results) if isinstance(r, Record)},
            "failures": {str(n): asdict(r) for n, r in enumerate(results) if isinstance(r, Failure)},
        }

    async def _choose(self, run: RunContext, state: GistState) -> dict[str, Any]:
        """Name pages by their gists; in turn, one at a time, until the model has enough."""
        opened, lines = state.get("opened", []), self._lines(run, state)
        tables = ["\n".join(lines[page] for page in table) for table in self.tables(run.scope)]
        results = await asyncio.gather(*(self._chosen(run, table, opened) for table in tables))
        chosen = [result.data["pages"] for result in results if isinstance(result, Record)]
        in_turn = chain.from_iterable(zip_longest(*chosen))  # the best of each table before the second best
        named = [page - 1 for page in in_turn if page is not None]
        if unknown := [page + 1 for page in named if not 0 <= page < len(lines)]:
            run.warn("unknown_page", f"pages were named that do not exist: {unknown}")
        fresh = [page for page in dict.fromkeys(named) if 0 <= page < len(lines) and page not in opened]
        most = 1 if self.mode == "sequential" else self.lookups
        opened = [*opened, *fresh[:most]]
        enough = any(isinstance(result, Record) and result.data["enough"] for result in results)
        again = self.mode == "sequential" and fresh and not enough and len(opened) < self.lookups
        failed = [result for result in results if isinstance(result, Failure)]
        failures = {"choose": asdict(failed[0])} if failed else {}
        left_out = len(fresh) - len(fresh[:most]) if self.mode == "parallel" else 0
        return {
            "opened": opened,
            "failures": failures,
            "not_forwarded": left_out,
            "route": "choose" if again else "answer",
        }

    async def _chosen(self, run: RunContext, table: str, opened: Sequence[int]) -> Record | Failure:
        """One choice; in turn it sees the pages that were opened, the latest first if not all fit."""
        scope, role, question = run.scope, run.scope.role(CHOOSE), run.scope.task.question
        shown = list(opened) if self.mode == "sequential" else []

        def pieces() -> list[tuple[str, str]]:
            return [("pages", table), *((piece.label, piece.text) for piece in self._opened(scope, shown))]

        while shown and scope.prompt_tokens(role.render(question, pieces(), scope.tag)) > (
            scope.profile.window - role.max_output
        ):
            shown.pop(0)
        return await ask(run, role, question, pieces(), finishing=True)

    async def _answer(self, run: RunContext, state: GistState) -> dict[str, Any]:
        opened = state.get("opened", [])
        if not opened:
            return {"draft": no_information(run)}
        kept = list(opened)
        while len(kept) > 1 and sum(answer_input(run.scope, self._opened(run.scope, kept))) > (
            run.scope.profile.window
        ):
            kept.pop()
        update = await answer_pieces(run, self._opened(run.scope, kept))
        return {**update, "not_forwarded": state.get("not_forwarded", 0) + len(opened) - len(kept)}

    def _opened(self, scope: Scope, pages: Sequence[int]) -> list[Piece]:
        """The text of pages, in the order of the source."""
        made = self.pages(scope)
        spans = [made.chunks[index].span for page in sorted(pages) for index in made.reads[page].chunks]
        return [Piece(scope.label(span), scope.text(span), span) for span in spans]

    def _lines(self, run: RunContext, state: GistState) -> list[str]:
        """The table of gists, a line a page; where there is none, the page's first sentence stands for it."""
        made, reads = self.pages(run.scope), state.get("reads", {})
        records = run.cache.get_many(list(reads.values()))
        lines = []
        for number, read in enumerate(made.reads):
            span = made.chunks[read.chunks[0]].span
            record = records.get(reads.get(str(number), ""))
            gist = _words(record) if record else ""
            if not gist:
                text = run.scope.text(span)
                start, end = next(iter(sentences(text)), (0, 200))
                gist = " ".join(text[start:end].split())
                run.warn("no_gist", "some pages have no gist; their first sentence stands for it")
            place = run.scope.label(span)[-40:]
            lines.append(self._fitted(run.scope, f"page {number + 1} ({place}): {gist}"))
        return lines

    def _fitted(self, scope: Scope, line: str) -> str:
        """A line of the table, cut to its share."""
        while len(line) > 16 and scope.text_tokens(line) > self.gist_tokens + LINE:
            line = line[: len(line) * 4 // 5]
        return line

    def _empty(self, scope: Scope) -> int:
        """Tokens of a choice besides its table."""
        role = scope.role(CHOOSE)
        shown = role.render(scope.task.question, [("pages", "")], scope.tag)
        return scope.prompt_tokens(shown) + role.max_output

    def covered(self, scope: Scope, state: State) -> Covered:
        return self.pages(scope).covered(state)


def _words(record: dict[str, Any]) -> str:
    """A gist with its names and figures on one line."""
    told = [record["gist"], ", ".join(record["names"]), ", ".join(record["figures"])]
    return " ".join("; ".join(part for part in told if part).split())
