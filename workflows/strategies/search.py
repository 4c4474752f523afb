"""Ask smaller questions, retrieve for each, read, and try again with what is known: width and depth.

    plan -> branch ×w -> answer -> plan … -> verify

IterDRAG, "Inference Scaling for Long-Context Retrieval Augmented Generation", arXiv 2410.04343, interleaves
sub-queries and retrieval; SPARC-RAG keeps parallel branches apart and leaves only with an answer that is
right and grounded. Ours keeps a register of verified quotes that only code changes. A branch that fails is
dropped alone; a query that was tried is refused; a round that finds nothing new is the last. Cost of a
round: one plan, w reads, one answer. Only what is retrieved is read, and the rest is reported as unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Failure, Plan, Span
from agentctx.workflows import cost
from agentctx.workflows.answering import answer_input, answer_pieces, answer_role, is_grounded, pieces_of
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.findings import LABEL, findings
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.notes import (
    Note,
    best_first,
    keep_record,
    no_information,
    spans_of,
    verified,
)
from agentctx.workflows.profile import Tier
from agentctx.workflows.rank import FirstStage
from agentctx.workflows.roles import READ, Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import Record, State, TaskKind
from agentctx.workflows.tasks.pipeline import SHOWN

QUERY_TOKENS = 64  # of a query; a longer one is cut, it is only words to look for
TRIED = "queries that were tried"
WANTED = "what this part of the search looks for"


class QueriesReply(Reply):
    """What to look for next."""

    example = MappingProxyType({"queries": ("words to look for",), "give_up": False})

    queries: list[str] = Field(default_factory=list, max_length=8)
    give_up: bool = False


QUERIES = Role(
    "queries",
    1,
    "You plan a search over a long source that you cannot see whole. You are shown what was found so far and "
    "which queries were tried. Write the next queries, each a few words that stand in the passage you want, "
    "for what is still missing to answer the question. give_up says that nothing more can be found.",
    QueriesReply,
    160,
)


class SearchState(State, total=False):
    """`register`: the record of what is known and tried; `round`: rounds that are done."""

    register: str
    round: int


@dataclass(frozen=True)
class Search(Strategy):
    """`width` queries a round, at most `rounds`, the `keep` best passages for each query."""

    name: ClassVar[str] = "search"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search", "multi_hop")
    state: ClassVar[type[State]] = SearchState
    width: int = 2
    rounds: int = 4
    keep: int = 8
    passage_tokens: int = 400
    register_tokens: int = 600

    def __post_init__(self) -> None:
        if min(self.width, self.rounds, self.keep) < 1:
            raise ConfigError(f"width, rounds and keep must be at least 1: {self}")
        if self.passage_tokens < LEAST or self.register_tokens < LEAST:
            raise ConfigError(f"passage_tokens and register_tokens must be at least {LEAST}: {self}")

    def needs(self, scope: Scope) -> Tier:
        return "writes"

    def known(self, scope: Scope) -> int:
        """Tokens of the register that a call is shown."""
        return min(self.register_tokens, scope.profile.window // 4)

    def passages(self, scope: Scope) -> list[Chunk]:
        return scope.chunks(min(self.passage_tokens, max(LEAST, scope.profile.window // 4)))

    def body_plan(self, scope: Scope) -> Plan:
        queries, read, profile = scope.role(QUERIES), scope.role(READ), scope.profile
        _, output = answer_input(scope, [])
        room = profile.window - queries.max_output
        each = [
            cost.stage("plan", queries.name, [room], queries.max_output, profile),
            cost.stage("read", read.name, [self._room(scope)] * self.width, read.max_output, profile),
            cost.stage("answer", answer_role(scope).name, [profile.window - output], output, profile),
        ]
        total = sum(passage.tokens for passage in self.passages(scope))
        most = self.rounds * self.width * self.keep * self.passage_tokens
        return cost.make_plan(
            self.name,
            {"passages": len(self.passages(scope)), **asdict(self)},
            each * self.rounds,
            largest_input=profile.window,
            largest_output=max(part.cost.output_tokens // part.cost.calls for part in each),
            hold=each[-1].cost,
            coverage=min(1.0, most / max(1, total)),
            supersteps=8 + 3 * self.rounds,
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "queries", self._queries)
        add_node(graph, "branch", self._branch)
        add_node(graph, "answer", self._answer)
        graph.add_conditional_edges("queries", lambda state: state["route"], ["branch", "answer"])
        graph.add_edge("branch", "answer")
        graph.add_conditional_edges("answer", lambda state: state["route"], ["queries", "verify"])
        return "queries"

    async def _queries(self, run: RunContext, state: SearchState) -> dict[str, Any]:
        """What to look for in this round; in the first, the question itself is one of the queries."""
        register = _register(run, state)
        notes = _notes_in(register)
        pieces = [(TRIED, "\n".join(query for query in register["tried"][-16:]))] if register["tried"] else []
        role = run.scope.role(QUERIES)
        if notes:
            pieces.append((LABEL, findings(run.scope, role, notes, self.known(run.scope))))
        result = await ask(run, role, run.scope.task.question, pieces)
        wanted = [] if register["tried"] else [run.scope.task.question]
        if isinstance(result, Record) and not result.data["give_up"]:
            wanted += result.data["queries"]
        fresh = _unseen([" ".join(query.split()) for query in wanted], register["tried"])[: self.width]
        key = keep_record(run, "register", {**register, "next": fresh, "tried": [*register["tried"], *fresh]})
        failures = {"queries": asdict(result)} if isinstance(result, Failure) else {}
        return {"register": key, "failures": failures, "route": "branch" if fresh else "answer"}

    async def _branch(self, run: RunContext, state: SearchState) -> dict[str, Any]:
        """Retrieve and read for each query, apart from one another."""
        register = _register(run, state)
        await asyncio.to_thread(self._first_stage, run.scope)
        results = await asyncio.gather(*(self._look(run, query) for query in register["next"]))
        known = {tuple(place) for note in register["notes"] for place in note["places"]}
        kept, failures, fresh = list(state.get("kept", [])), {}, []
        for number, (read, notes) in enumerate(results):
            if isinstance(notes, Failure):
                failures[f"branch {state.get('round', 0)}.{number}"] = asdict(notes)
                continue
            kept += [index for index in read if index not in kept]
            for note in notes:
                if not {tuple(place) for place in note["places"]} <= known:
                    known |= {tuple(place) for place in note["places"]}
                    fresh.append(note)
        key = keep_record(
            run, "register", {**register, "notes": [*register["notes"], *fresh], "new": len(fresh)}
        )
        return {"register": key, "kept": kept, "failures": failures}

    async def _look(self, run: RunContext, query: str) -> tuple[list[int], list[dict[str, Any]] | Failure]:
        """The passages that were read for a query, and what they say."""
        scope, passages = run.scope, self.passages(run.scope)
        scores = await asyncio.to_thread(self._first_stage(scope).scores, query)
        best = sorted(range(len(passages)), key=lambda index: -scores[index])[: self.keep]
        role = scope.role(READ)
        wanted = [(WANTED, _cut_to(scope, query))]

        def pieces(chosen: Sequence[int]) -> list[tuple[str, str]]:
            spans = [passages[index].span for index in sorted(chosen)]
            return [*wanted, *((scope.label(span), scope.text(span)) for span in spans)]

        def tokens(chosen: Sequence[int]) -> int:
            return scope.prompt_tokens(role.render(scope.task.question, pieces(chosen), scope.tag))

        while len(best) > 1 and tokens(best) > self._room(scope):
            best.pop()
        result = await ask(run, role, scope.task.question, pieces(best))
        if isinstance(result, Failure):
            return best, result
        spans = [passages[index].span for index in best]
        notes = []
        for claim in result.data["facts"]:
            found = await asyncio.to_thread(verified, run, claim["quotes"], spans)
            places = [[span.document_id, span.start, span.end] for span in found]
            if places:
                confidence = result.data["confidence"]
                notes.append({"text": claim["text"], "places": places, "confidence": confidence})
        return best, notes

    async def _answer(self, run: RunContext, state: SearchState) -> dict[str, Any]:
        """Try to answer from the register; go on unless that is grounded or nothing new came up."""
        register, done = _register(run, state), state.get("round", 0) + 1
        notes = best_first(_notes_in(register))
        if not notes:
            update: dict[str, Any] = {"draft": no_information(run)}
        else:
            pieces = pieces_of(run.scope, notes)
            update = {**await answer_pieces(run, pieces), "not_forwarded": len(notes) - len(pieces)}
        # A first round without a find is no reason to stop: the next queries may use other words.
        stale = not register["next"] or (not register["new"] and done > 1)
        ends = done >= self.rounds or stale or run.winding_down() is not None
        if not ends:
            ends = await asyncio.to_thread(is_grounded, run, update)
        return {**update, "round": done, "route": "verify" if ends else "queries"}

    def _first_stage(self, scope: Scope) -> FirstStage:
        """The lexical index of the passages, made once."""
        passages = self.passages(scope)
        return scope.keep((self, "first"), lambda: FirstStage([scope.text(p.span) for p in passages]))

    def _room(self, scope: Scope) -> int:
        """Tokens of the prompt of a read, at most."""
        return scope.profile.window - scope.role(READ).max_output

    def salvage(self, run: RunContext, state: State) -> list[list[Any]]:
        notes = best_first(_notes_in(_register(run, cast(SearchState, state))))
        return spans_of(notes[:SHOWN])

    def covered(self, scope: Scope, state: State) -> Covered:
        return Covered(
            self.passages(scope),
            read=frozenset(state.get("kept", ())),
            not_forwarded=state.get("not_forwarded", 0),
        )


def _register(run: RunContext, state: SearchState) -> dict[str, Any]:
    """What is known (`notes`), tried, to be tried `next`, and how many notes were `new` in the last round."""
    key = state.get("register")
    found: dict[str, Any] | None = run.cache.get(key) if key else None
    return found or {"notes": [], "tried": [], "next": [], "new": 0}


def _notes_in(register: dict[str, Any]) -> list[Note]:
    return [
        Note(number, note["text"], tuple(Span(*place) for place in note["places"]), note["confidence"])
        for number, note in enumerate(register["notes"])
    ]


def _unseen(queries: Sequence[str], tried: Sequence[str]) -> list[str]:
    """Those that are not empty and were not tried, each once."""
    seen = {query.casefold() for query in tried}
    fresh = []
    for query in queries:
        if query and query.casefold() not in seen:
            seen.add(query.casefold())
            fresh.append(query)
    return fresh


def _cut_to(scope: Scope, query: str) -> str:
    words = query.split()
    while len(words) > 1 and scope.text_tokens(" ".join(words)) > QUERY_TOKENS:
        words.pop()
    return " ".join(words)
