"""Node types that make no call: `split`, `filter`, `select`, `merge`, `vote`, `list`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Stage
from agentctx.workflows import cost
from agentctx.workflows.combine import Item
from agentctx.workflows.definition.neural import draft, notes_read
from agentctx.workflows.definition.schema import Form
from agentctx.workflows.definition.site import NodeType, Result, Site, Step, cut_of
from agentctx.workflows.meter import MeteredReader, Refused
from agentctx.workflows.notes import keep_record, no_information, point_of, stated, verified
from agentctx.workflows.rank import CANDIDATES, LEXICAL_WEIGHT, FirstStage
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.split import LEAST
from agentctx.workflows.state import Operation, Part
from agentctx.workflows.strategies.map_reduce import GIST_TOKENS
from agentctx.workflows.tasks.aggregate import united
from agentctx.workflows.tasks.classify import elected
from agentctx.workflows.tasks.items import items_of


class SplitParams(Form):
    """Cut the sources. `chunk_tokens`: at most; left out, what the window allows. `per`: never across."""

    chunk_tokens: int | None = Field(None, ge=LEAST)
    per: Part = "all"

    @property
    def least(self) -> int:
        """For a model that only reads, where the file does not say."""
        return GIST_TOKENS


class FilterParams(Form):
    """Keep what has one of the `words` in its text, comes from one of the `sources`, is surely noted."""

    words: list[str] = Field(default_factory=list, max_length=100)
    sources: list[str] = Field(default_factory=list, max_length=100)
    min_confidence: int = Field(0, ge=0, le=5)
    evidence: bool = False


class SelectParams(Form):
    """The `k` chunks that fit the question, or `query`, best. A later visit takes the next ones.

    `by`: their words alone, or, of those whose words fit, how likely each makes the question; only a local
    model can tell that.
    """

    k: int = Field(ge=1, le=10_000)
    query: str | None = Field(None, min_length=1, max_length=1000)
    by: Literal["words", "likelihood"] = "words"

    @property
    def candidates(self) -> int:
        """How many chunks the Reader looks at in one visit."""
        return max(self.k, CANDIDATES)


class MergeParams(Form):
    """Unite items by name, then list, count, add or compare them; left out, as the question says."""

    operation: Operation | None = None


class VoteParams(Form):
    """Count the labels that the reads gave."""


class ListParams(Form):
    """Every note with its quote, in reading order, part by part."""


def _free(site: Site, scope: Scope) -> list[Stage]:
    return []


def _split(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        made = await asyncio.to_thread(cut_of, site, run.scope)
        return Result(list(range(len(made.reads))))

    return step


def _text(scope: Scope, split: Site, number: int) -> str:
    made = cut_of(split, scope)
    return "\n".join(text for _, text in made.pieces(scope, made.reads[number]))


def _filter_check(site: Site) -> str:
    params: FilterParams = site.params
    if not (params.words or params.sources or params.min_confidence or params.evidence):
        return "it keeps everything: give words, sources, min_confidence or evidence"
    if site.ports[0].kind == "chunks" and (params.min_confidence or params.evidence):
        return "min_confidence and evidence are for records; chunks have neither"
    return "" if len(site.ports) == 1 else "it reads one value"


def _filter(site: Site) -> Step:
    params: FilterParams = site.params
    words = [word.casefold() for word in params.words]

    def fits(run: RunContext, split: Site, number: int) -> bool:
        made = cut_of(split, run.scope)
        pieces = made.pieces(run.scope, made.reads[number])
        named = not params.sources or any(fnmatchcase(p[0], glob) for p in pieces for glob in params.sources)
        return named and (
            not words or any(word in _text(run.scope, split, number).casefold() for word in words)
        )

    def sure(run: RunContext, split: Site, number: int, data: Mapping[str, Any]) -> bool:
        if data.get("confidence", 5) < params.min_confidence:
            return False
        made = cut_of(split, run.scope)
        spans = [made.chunks[i].span for i in made.reads[number].chunks]
        return not params.evidence or any(verified(run, c["quotes"], spans) for c in stated(data) or ())

    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        port = site.ports[0]
        given, split = values.get(port.key, []), port.origin
        assert split
        if port.kind == "chunks":
            return Result([number for number in given if fits(run, split, number)])
        records = run.cache.get_many(list(given.values()))

        def wanted(number: int, key: str) -> bool:
            return fits(run, split, number) and sure(run, split, number, records[key])

        kept = await asyncio.to_thread(lambda: {n: key for n, key in given.items() if wanted(int(n), key)})
        return Result(kept, not_forwarded=len(given) - len(kept))

    return step


def _select(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        port = site.ports[0]
        assert port.origin
        split, params = port.origin, site.params
        taken = set(values["taken"])
        index: FirstStage = await asyncio.to_thread(_index, run, split)
        scores = await asyncio.to_thread(index.scores, _query(site, run.scope))
        left = [number for number in values.get(port.key, []) if number not in taken]
        left.sort(key=lambda number: -scores[number])
        likely: dict[int, float] = {}
        if params.by == "likelihood":
            likely = await _likelihoods(run, site, left[: params.candidates])
            for number, likelihood in likely.items():
                scores[number] = likelihood + LEXICAL_WEIGHT * scores[number]
            left = sorted(likely, key=lambda number: -scores[number]) or left
        best = left[: params.k]
        return Result(sorted(best), taken=best, weighed=sorted(likely))

    return step


def _query(site: Site, scope: Scope) -> str:
    return str(site.params.query or scope.task.question)


async def _likelihoods(run: RunContext, site: Site, numbers: Sequence[int]) -> dict[int, float]:
    """How likely each of these reads makes the question; nothing if the budget does not allow to look."""
    split = site.ports[0].origin
    assert split
    try:
        seen = await MeteredReader(run).likelihood(
            _query(site, run.scope), [_text(run.scope, split, number) for number in numbers]
        )
    except Refused as refused:
        run.warn("ranked_by_words", f"{site.name}: chunks were selected by their words alone ({refused})")
        return {}
    return dict(zip(numbers, seen.values, strict=True))


def _select_ceiling(site: Site, scope: Scope) -> list[Stage]:
    split = site.ports[0].origin
    if site.params.by == "words" or split is None:
        return []
    if scope.reader is None:
        raise ConfigError(
            f"{site.name} selects by likelihood; {scope.profile.name} cannot score text without generating",
            hint="write by: words, or run it with a local model",
        )
    question, reads = _query(site, scope), range(len(cut_of(split, scope).reads))
    costs = [scope.reader.likelihood_cost(question, [_text(scope, split, number)]) for number in reads]
    most = sum(sorted(costs, reverse=True)[: site.params.candidates])
    return [cost.scoring(site.name, most, scope.profile)]


def _index(run: RunContext, split: Site) -> FirstStage:
    def make() -> FirstStage:
        return FirstStage([_text(run.scope, split, n) for n in range(len(cut_of(split, run.scope).reads))])

    return run.scope.keep((split, "words"), make)


def _merge(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        items: list[Item] = []
        for port in site.ports:
            if port.origin:
                made = cut_of(port.origin, run.scope)
                items += await asyncio.to_thread(items_of, run, made, {"reads": values.get(port.key, {})})
        return Result(draft(united(run, items, site.params.operation)))

    return step


def _vote_check(site: Site) -> str:
    return "" if len(site.ports) == len(site.ports[0].writers) == 1 else "it counts what one node read"


def _vote(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        port = site.ports[0]
        assert port.origin
        labels = reader_of(site).params.labels
        record, left_out = await asyncio.to_thread(
            elected, run, cut_of(port.origin, run.scope), values.get(port.key, {}), labels
        )
        return Result(draft(record), not_forwarded=left_out)

    return step


def reader_of(site: Site) -> Site:
    """The node whose calls made the records that a node reads, through filters."""
    writer = site.ports[0].writers[0]
    return writer if writer.type.mapped else reader_of(writer)


def _list(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        points: list[dict[str, Any]] = []
        for note in await asyncio.to_thread(notes_read, run, site, values):
            part = ""
            port = site.ports[0]
            if note.read >= 0 and port.origin and len(site.ports) == 1:
                made = cut_of(port.origin, run.scope)
                part = made.parts[made.reads[note.read].part]
            points.append(point_of(note, part))
        if not points:
            return Result(draft(no_information(run)))
        return Result(draft(keep_record(run, "list", {"points": points, "no_information": False})))

    return step


def _k(site: Site) -> int | None:
    return int(site.params.k)


def _symbolic(params: type[Form], build: Callable[[Site], Step], **rest: Any) -> NodeType:
    return NodeType(params, build, **{"ceiling": _free, **rest})


SPLIT_TYPE = _symbolic(SplitParams, _split, gives="chunks")
FILTER_TYPE = _symbolic(
    FilterParams,
    _filter,
    takes=("chunks", "records"),
    gives=None,
    schemas=("facts", "points", "items", "label"),
    check=_filter_check,
)
SELECT_TYPE = _symbolic(
    SelectParams, _select, takes=("chunks",), gives="chunks", most=_k, ceiling=_select_ceiling
)
MERGE_TYPE = _symbolic(MergeParams, _merge, takes=("records",), schemas=("items",))
VOTE_TYPE = _symbolic(VoteParams, _vote, takes=("records",), schemas=("label",), check=_vote_check)
LIST_TYPE = _symbolic(ListParams, _list, takes=("records", "answer"))
