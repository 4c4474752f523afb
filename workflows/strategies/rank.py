"""Order documents, or the passages of one, by how well they answer; quote the best.

    rank -> quote -> verify

`likelihood`: the Reader says how well each passage predicts the question (`workflows.rank`), every one of
them. A passage is scored alone, so the order in which candidates come changes nothing (what a layout of
documents side by side is for in Set-Based Prompting, arXiv 2406.06581, and in BlockRank, arXiv 2510.05396),
and its keys and values, once computed, serve every later question. `window`: a chat model orders some
candidates at a time, from the end of the list to its beginning, so that the best rise (Sun et al., "Is
ChatGPT Good at Search?", arXiv 2304.09542); `listwise`: all of them in one call. What its reply leaves out
keeps its order, what it invents is dropped, and both are counted.

Cost: the tokens of all passages and no call; or ⌈(N - window) / stride⌉ + 1 calls over N candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, cast

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Chunk, Failure, Plan, Stage
from agentctx.workflows import cost
from agentctx.workflows.call import ask
from agentctx.workflows.conclude import Covered
from agentctx.workflows.frame import Graph, Strategy, add_node
from agentctx.workflows.meter import MeteredReader, Refused
from agentctx.workflows.notes import keep_record
from agentctx.workflows.permute import permuted
from agentctx.workflows.pick import Picked, pick, pick_cost
from agentctx.workflows.profile import Tier
from agentctx.workflows.rank import FirstStage, rank, rank_cost
from agentctx.workflows.roles import RANK, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import State, TaskKind

Mode = Literal["auto", "likelihood", "window", "listwise"]
By = Literal["auto", "document", "passage"]
ID_TOKENS = 6  # of one number in a reply, with its comma
REPLY_TOKENS = 16  # around the numbers


class RankState(State, total=False):
    """`order`: of each candidate its best passage, the best first. `lost`: passages of failed calls."""

    order: list[int]
    scores: list[float]  # of the candidates in that order, if a Reader gave any
    lost: list[int]


@dataclass(frozen=True)
class Rank(Strategy):
    """The best `top` are quoted, the whole order is in the answer's `value`. `by` "auto": documents, if there
    are several. A document counts as its best passage, of `passage_tokens` at most. `mode` "auto": by
    likelihood with a Reader, else in a window.
    """

    name: ClassVar[str] = "rank"
    kinds: ClassVar[tuple[TaskKind, ...]] = ("search",)
    state: ClassVar[type[State]] = RankState
    gives_way: ClassVar[bool] = False
    mode: Mode = "auto"
    by: By = "auto"
    top: int = 10
    passage_tokens: int = 400
    window: int = 20
    stride: int = 10

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "likelihood", "window", "listwise"):
            raise ConfigError(f"mode must be auto, likelihood, window or listwise, got {self.mode!r}")
        if self.by not in ("auto", "document", "passage"):
            raise ConfigError(f"by must be auto, document or passage, got {self.by!r}")
        if self.top < 1 or self.passage_tokens < LEAST:
            raise ConfigError(f"top must be at least 1 and passage_tokens at least {LEAST}: {self}")
        if not 1 <= self.stride < self.window:
            raise ConfigError(f"stride must be at least 1 and below window: {self}")

    def needs(self, scope: Scope) -> Tier:
        return "reads" if self.scores(scope) else "judges"

    def scores(self, scope: Scope) -> bool:
        """True if the Reader orders. Raises ConfigError if it should and there is none."""
        if self.mode == "likelihood" and scope.reader is None:
            raise ConfigError(
                f"{scope.profile.name} cannot score text without generating", hint="use the mode window"
            )
        return scope.reader is not None and self.mode in ("auto", "likelihood")

    def passages(self, scope: Scope) -> list[Chunk]:
        share = 2 if self.scores(scope) else 8
        return scope.chunks(min(self.passage_tokens, max(LEAST, scope.profile.window // share)))

    def candidates(self, scope: Scope) -> list[list[int]]:
        """The passages of each."""
        passages = self.passages(scope)
        if self.by == "passage" or (self.by == "auto" and len(scope.documents) == 1):
            return [[number] for number in range(len(passages))]
        of: dict[str, list[int]] = {}
        for number, passage in enumerate(passages):
            of.setdefault(passage.span.document_id, []).append(number)
        return list(of.values())

    def body_plan(self, scope: Scope) -> Plan:
        passages, question = self.passages(scope), scope.task.question
        texts = self._texts(scope)
        largest = output = 0
        shown = sum(passages[number].tokens for number in self._words_order(scope))
        if self.scores(scope):
            first, every = self._first_stage(scope), len(texts)
            tokens = rank_cost(question, texts, reader=scope.reader, candidates=every, first=first)
            stages, shown = [cost.scoring("rank", tokens, scope.profile)], 0
        else:
            role, largest, width = self._judge(scope)
            calls = len(list(self._windows(len(self.candidates(scope)), width)))
            output = role.max_output
            stages = [self._stage(scope, role, [largest] * calls)]
        if scope.reader:
            quoting = sorted(pick_cost(question, [text], reader=scope.reader) for text in texts)[-self.top :]
            stages.append(cost.scoring("quote", sum(quoting), scope.profile))
        return cost.make_plan(
            self.name,
            {"passages": len(passages), "candidates": len(self.candidates(scope)), **asdict(self)},
            stages,
            largest_input=largest,
            largest_output=output,
            hold=stages[1].cost if scope.reader else cost.NOTHING,
            coverage=min(1.0, shown / max(1, sum(passage.tokens for passage in passages))),
            supersteps=8,
            assumptions=scope.assumptions(),
        )

    def body(self, graph: Graph) -> str:
        add_node(graph, "rank", self._rank)
        add_node(graph, "quote", self._quote)
        graph.add_edge("rank", "quote")
        graph.add_edge("quote", "verify")
        return "rank"

    def covered(self, scope: Scope, state: State) -> Covered:
        read = frozenset(state.get("kept", ()))
        lost = frozenset(cast(RankState, state).get("lost", ()))
        scored = frozenset(state.get("scored", ()))
        return Covered(self.passages(scope), read=read, failed=lost - read, scored=scored)

    async def _rank(self, run: RunContext, state: RankState) -> dict[str, Any]:
        if not self.scores(run.scope):
            return await self._judged(run)
        texts, first = self._texts(run.scope), self._first_stage(run.scope)
        question = run.scope.task.question
        labels: dict[str, list[str]] = {}
        for text, passage in zip(texts, self.passages(run.scope), strict=True):
            labels.setdefault(text, []).append(run.scope.label(passage.span))
        try:
            reader = MeteredReader(run, holders=labels.__getitem__)
            found = await rank(question, texts, reader=reader, candidates=len(texts), first=first)
        except Refused as refused:
            run.warn("ranked_by_words", f"the candidates were ranked by words alone ({refused})")
            found = await rank(question, texts, reader=None, first=first)
        best = self._best(run.scope, found.scores)
        return {
            "order": best,
            "scores": [found.scores[number] for number in best],
            "scored": sorted(found.scored),
        }

    async def _judged(self, run: RunContext) -> dict[str, Any]:
        """The order that a chat model gives, window by window; each is one call."""
        scope = run.scope
        role, largest, width = self._judge(scope)
        order = self._words_order(scope)
        read: set[int] = set()
        lost: set[int] = set()
        failures = {}
        missing = unknown = 0
        for start, end in self._windows(len(order), width):
            if run.winding_down():
                break
            pieces = self._pieces(scope, order[start:end])
            while scope.prompt_tokens(role.render(scope.task.question, pieces, scope.tag)) > largest:
                pieces.pop()
            shown = order[start : start + len(pieces)]
            result = await ask(run, role, scope.task.question, pieces)
            if isinstance(result, Failure):
                lost.update(shown)
                failures[str(start)] = asdict(result)
                continue
            read.update(shown)
            found = permuted(result.data["ids"], len(shown))
            order[start : start + len(shown)] = [shown[at] for at in found.order]
            missing, unknown = missing + found.missing, unknown + found.unknown
        if missing or unknown:
            said = f"{missing} texts were not named and keep their order, {unknown} unknown numbers dropped"
            run.warn("rank_repaired", said)
        return {"order": order, "kept": sorted(read), "lost": sorted(lost), "failures": failures}

    async def _quote(self, run: RunContext, state: RankState) -> dict[str, Any]:
        """The order as the answer's value, and of the best the sentence that speaks for each."""
        scope, passages = run.scope, self.passages(run.scope)
        order, scores = state["order"], state.get("scores", [])
        whole = [self._place(scope, number) for number in order]
        value = [
            {"source": source, "start": start, "end": end, "score": round(score, 4) if scores else None}
            for (source, start, end), score in zip(whole, scores or [0.0] * len(order), strict=True)
        ]
        claims = []
        for number, entry in zip(order[: self.top], value, strict=False):
            span = passages[number].span
            chosen = (await self._picked(run, scope.text(span))).picks
            score = "" if entry["score"] is None else f" ({entry['score']})"
            claims.append(
                {
                    "text": f"{entry['source']}, {entry['start']} to {entry['end']}{score}",
                    "quotes": [],
                    "spans": [[span.document_id, span.start + p.start, span.start + p.end] for p in chosen],
                }
            )
        return {"draft": keep_record(run, "rank", {"claims": claims, "value": value})}

    async def _picked(self, run: RunContext, text: str) -> Picked:
        question = run.scope.task.question
        reader = MeteredReader(run, finishing=True) if run.scope.reader else None
        try:
            return await pick(question, [text], reader=reader, limit=1)
        except Refused:
            return await pick(question, [text], reader=None, limit=1)

    def _place(self, scope: Scope, number: int) -> tuple[str, int, int]:
        span = self.passages(scope)[number].span
        return scope.label(span), span.start, span.end

    def _texts(self, scope: Scope) -> list[str]:
        return [scope.text(passage.span) for passage in self.passages(scope)]

    def _first_stage(self, scope: Scope) -> FirstStage:
        """The lexical index of the passages, shared by the plan and the run."""
        return scope.keep((self, "first"), lambda: FirstStage(self._texts(scope)))

    def _words_order(self, scope: Scope) -> list[int]:
        """The best passage of each candidate by words, the best first: what a judge starts from."""
        scores = self._first_stage(scope).scores(scope.task.question)
        return scope.keep((self, "words"), lambda: self._best(scope, scores))[:]

    def _best(self, scope: Scope, scores: Sequence[float]) -> list[int]:
        best = [max(numbers, key=lambda number: scores[number]) for numbers in self.candidates(scope)]
        return sorted(best, key=lambda number: -scores[number])

    def _judge(self, scope: Scope) -> tuple[Role, int, int]:
        """Who orders, the tokens of its largest prompt, and how many candidates it is shown at once."""
        question, passages = scope.task.question, self.passages(scope)
        empty = (f"{len(passages)}: {max(scope.labels(), key=len)}", "")
        one, two = (scope.prompt_tokens(RANK.render(question, [empty] * n, scope.tag)) for n in (1, 2))
        none = 2 * one - two
        each = (two - one + max(passage.tokens for passage in passages)) * 5 // 4
        room = (scope.profile.window - none - REPLY_TOKENS) // (each + ID_TOKENS)
        count = len(self.candidates(scope))
        wanted = count if self.mode == "listwise" else min(self.window, count)
        if room < min(2, count) or (self.mode == "listwise" and room < wanted):
            raise ConfigError(
                f"{wanted} candidates do not fit the window of {scope.profile.name} together, {room} do",
                hint="use the mode window, or fewer passage_tokens",
            )
        width = min(wanted, room)
        role = replace(RANK, max_output=REPLY_TOKENS + ID_TOKENS * width)
        return role, none + each * width, width

    def _windows(self, count: int, width: int) -> Iterator[tuple[int, int]]:
        """From the last to the first; one candidate needs no call."""
        stride, end = max(1, self.stride * width // self.window), count
        while count > 1:
            yield max(0, end - width), end
            if end <= width:
                return
            end -= stride

    def _pieces(self, scope: Scope, shown: Sequence[int]) -> list[tuple[str, str]]:
        spans = [self.passages(scope)[number].span for number in shown]
        return [(f"{at}: {scope.label(span)}", scope.text(span)) for at, span in enumerate(spans, 1)]

    def _stage(self, scope: Scope, role: Role, inputs: Sequence[int]) -> Stage:
        return cost.stage("judge", role.name, inputs, role.max_output, scope.profile, waves=len(inputs))
