"""Node types that call the model: `read`, `reduce`, `answer`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field

from agentctx.memory.types import Failure, Span, Stage
from agentctx.workflows import cost
from agentctx.workflows.answering import Piece, answer_input, answer_pieces, answer_role, pieces_of
from agentctx.workflows.call import ask
from agentctx.workflows.definition.schema import Form
from agentctx.workflows.definition.site import Asked, NodeType, Result, Site, Step, cut_of, prompts
from agentctx.workflows.notes import (
    MAX_POINTS,
    Merged,
    Note,
    at_home,
    best_first,
    keep_record,
    merge_level,
    no_information,
    notes_of,
    placed,
    point_of,
    side_by_side,
    stated,
)
from agentctx.workflows.pick import pick_cost
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import GIST, MERGE, READ, SHORT_ANSWER, SUMMARISE, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Record
from agentctx.workflows.tasks.classify import LABEL, labelled
from agentctx.workflows.tasks.items import ITEMS
from agentctx.workflows.tasks.search import answer_doubling
from agentctx.workflows.tasks.summarise import merge_width

ROLES: Mapping[str, Role] = {"facts": READ, "points": SUMMARISE, "items": ITEMS, "label": LABEL}
PLAIN: Mapping[str, Role] = {"facts": SHORT_ANSWER, "points": GIST}  # for a model that only reads


class ReadParams(Form):
    """Read each chunk on its own. `schema`: what is noted; `prompt`: a file that says how, in your words."""

    schema_: Literal["facts", "points", "items", "label"] = Field("facts", alias="schema")
    question: str | None = Field(None, min_length=1, max_length=4000)
    prompt: str | None = Field(None, min_length=1, max_length=200)
    labels: list[str] = Field(default_factory=list, max_length=64)


class ReduceParams(Form):
    """Merge all notes into one list of points, in a tree. `fan_in`: how many one merge takes."""

    fan_in: Literal["auto"] | int = "auto"


class AnswerParams(Form):
    """Answer from notes or chunks. `doubling`: try with the best 1, 2, 4, … notes until it is grounded."""

    doubling: bool = True


def _asks(site: Site, scope: Scope) -> Asked:
    params: ReadParams = site.params
    role = ROLES[params.schema_]
    if not scope.profile.writes:
        role = PLAIN.get(params.schema_, role)
    if text := site.text("prompt"):
        role = replace(role, instruction=text.strip())
    question = params.question or scope.task.question
    return scope.role(role), labelled(question, params.labels) if params.labels else question


def _read_check(site: Site) -> str:
    params: ReadParams = site.params
    if (params.schema_ == "label") != bool(params.labels):
        return "labels belong to the schema label: give at least two, or leave both out"
    if params.labels and len({label.casefold() for label in params.labels}) < 2:
        return "at least two different labels are needed"
    return ""


def _read_ceiling(site: Site, scope: Scope) -> list[Stage]:
    role, _ = _asks(site, scope)
    largest = sorted(prompts(site, scope), reverse=True)[: site.ports[0].most(scope)]
    return [cost.stage(site.name, role.name, largest, role.max_output, scope.profile)]


def _read(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        assert site.origin
        made = cut_of(site.origin, run.scope)
        role, question = _asks(site, run.scope)

        async def one(number: int) -> Record | Failure:
            result = await ask(run, role, question, made.pieces(run.scope, made.reads[number]))
            if isinstance(result, Record):
                run.see({site.key: {str(number): result.id}})
            return result

        numbers: Sequence[int] = values["items"]
        results = dict(zip(numbers, await asyncio.gather(*map(one, numbers)), strict=True))
        return Result(
            {str(n): r.id for n, r in results.items() if isinstance(r, Record)},
            {str(n): asdict(r) for n, r in results.items() if isinstance(r, Failure)},
        )

    return step


def _writes(site: Site) -> Tier:
    plain = site.params.schema_ in PLAIN and not site.params.prompt
    return "reads" if plain else "writes"


def notes_read(run: RunContext, site: Site, values: Mapping[str, Any]) -> list[Note]:
    """The notes in what a node reads, in reading order; all of a draft count as one read."""
    notes: list[Note] = []
    everywhere = [chunk.span for chunk in run.scope.whole()]
    for number, port in enumerate(site.ports):
        value = values.get(port.key)
        if not value or port.kind == "chunks":
            continue
        if port.kind == "records" and port.origin:
            notes += notes_of(run, cut_of(port.origin, run.scope), value)
            continue
        data = run.cache.get(value["draft"]) or {}
        shown = [Span(*place) for place in data.get("shown", ())]
        for claim in stated(data) or ():
            found = placed(run, placed(run, claim, shown), everywhere)["spans"]
            if places := tuple(Span(*place) for place in found):
                notes.append(Note(-1 - number, claim["text"], places, 0))
        if "text" in data and "claims" not in data and value["spans"]:
            spans = tuple(Span(*span[:3]) for span in value["spans"])
            notes.append(Note(-1 - number, data["text"], spans, 0))
    return notes


def _reduce_ceiling(site: Site, scope: Scope) -> list[Stage]:
    role = scope.role(MERGE)
    merges = 0
    if scope.profile.writes:
        reads = sum(port.most(scope) for port in site.ports)
        merges = cost.tree(reads, merge_width(scope, _fan_in(site))).merges
    room = scope.profile.window - role.max_output
    return [cost.stage(site.name, role.name, [room] * merges, role.max_output, scope.profile)]


def _fan_in(site: Site) -> int | None:
    return None if site.params.fan_in == "auto" else int(site.params.fan_in)


def _reduce(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        if not run.scope.profile.writes:
            notes = await asyncio.to_thread(notes_read, run, site, values)
            kept = [point_of(note) for note in notes[:MAX_POINTS]]
            return Result(_points(run, kept), not_forwarded=max(0, len(notes) - MAX_POINTS))
        group = [
            record[n] for port in site.ports for record in [values.get(port.key, {})] for n in _order(record)
        ]
        levels = [Merged(group)]
        while len(levels[-1].records) > 1:
            width = merge_width(run.scope, _fan_in(site))
            levels.append(await merge_level(run, levels[-1].records, width))
        data = run.cache.get(levels[-1].records[0]) if group else None
        below = side_by_side(levels)
        points = await asyncio.to_thread(_placed, run, site, values, stated(data or {}) or [])
        return Result(_points(run, points), below.failures, below.left_out)

    return step


def _placed(
    run: RunContext, site: Site, values: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The merged points with the places of their quotes in what the node's records read."""
    for port in site.ports:
        if port.origin:
            points = at_home(run, cut_of(port.origin, run.scope), values.get(port.key, {}), points)
    return points


def _order(record: Mapping[str, str]) -> list[str]:
    return sorted(record, key=int)


def _points(run: RunContext, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept = [{name: point[name] for name in ("text", "quotes", "spans")} for point in points]
    return draft(keep_record(run, "points", {"points": kept, "no_information": not kept}))


def draft(record: str, spans: Sequence[Any] = ()) -> dict[str, Any]:
    """The value of a node that gives an answer."""
    return {"draft": record, "spans": list(spans)}


def _answer_check(site: Site) -> str:
    kinds = {port.kind for port in site.ports}
    return "it reads chunks or notes, not both" if "chunks" in kinds and len(kinds) > 1 else ""


def _answer_ceiling(site: Site, scope: Scope) -> list[Stage]:
    role, profile = answer_role(scope), scope.profile
    _, output = answer_input(scope, [])
    room = profile.window - output
    if site.ports[0].kind != "chunks":
        reads = sum(port.most(scope) if port.kind == "records" else 1 for port in site.ports)
        calls = (reads - 1).bit_length() + 1 if site.params.doubling else 1
        if not profile.writes:
            calls = 0 if site.params.doubling else 1
        return [cost.stage(site.name, role.name, [room] * calls, output, profile, waves=calls)]
    largest = [max(prompts_of(port.origin, scope)) for port in site.ports if port.origin]
    stages = [cost.stage(site.name, role.name, [max(room, *largest)], output, profile)]
    if scope.reader and not profile.writes:
        texts = [text for port in site.ports if port.origin for text in _texts(port.origin, scope)]
        count = sum(port.most(scope) for port in site.ports)
        looked = pick_cost(
            scope.task.question, sorted(texts, key=len, reverse=True)[:count], reader=scope.reader
        )
        stages.append(cost.scoring(f"{site.name}: pick", looked, profile))
    return stages


def prompts_of(split: Site, scope: Scope) -> list[int]:
    """Tokens of an answer's prompt over each read of a split alone."""
    made = cut_of(split, scope)

    def make() -> list[int]:
        return [answer_input(scope, _pieces(split, scope, [n]))[0] for n in range(len(made.reads))]

    return scope.keep((split, "answers"), make)


def _texts(split: Site, scope: Scope) -> list[str]:
    return [piece.text for piece in _pieces(split, scope, range(len(cut_of(split, scope).reads)))]


def _pieces(split: Site, scope: Scope, numbers: Sequence[int]) -> list[Piece]:
    made = cut_of(split, scope)
    spans = [made.chunks[i].span for number in numbers for i in made.reads[number].chunks]
    return [Piece(scope.label(span), scope.text(span), span) for span in spans]


def _answer(site: Site) -> Step:
    async def step(run: RunContext, values: Mapping[str, Any]) -> Result:
        if site.ports[0].kind == "chunks":
            return await _from_chunks(run, site, values)
        notes = best_first(await asyncio.to_thread(notes_read, run, site, values))
        if site.params.doubling or not notes:
            update = await answer_doubling(run, notes)
        else:
            pieces = pieces_of(run.scope, notes)
            update = {**await answer_pieces(run, pieces), "not_forwarded": len(notes) - len(pieces)}
        return _result(run, update)

    return step


async def _from_chunks(run: RunContext, site: Site, values: Mapping[str, Any]) -> Result:
    """From the text itself: as many chunks as fit, in the order given, shown in that of the text."""
    pieces: list[Piece] = []
    shown: list[int] = []
    for port in site.ports:
        assert port.origin
        for number in values.get(port.key, ()):
            more = [*pieces, *_pieces(port.origin, run.scope, [number])]
            tokens, output = answer_input(run.scope, more)
            if pieces and tokens + output > run.scope.profile.window:
                break
            pieces, shown = more, [*shown, number]
    if not pieces:
        return Result(draft(no_information(run)))
    order = {document: n for n, document in enumerate(run.scope.documents)}
    pieces.sort(key=lambda piece: (order[piece.span.document_id], piece.span.start) if piece.span else (0, 0))
    result = _result(run, await answer_pieces(run, pieces))
    # What was sent in a call that failed was not read.
    failed = {str(number): failure for failure in result.failures.values() for number in shown}
    return replace(result, failures=failed) if failed else replace(result, shown=shown)


def _result(run: RunContext, update: Mapping[str, Any]) -> Result:
    value = draft(update.get("draft") or no_information(run), update.get("spans", ()))
    return Result(value, update.get("failures", {}), update.get("not_forwarded", 0))


READ_TYPE = NodeType(
    ReadParams,
    _read,
    _read_ceiling,
    takes=("chunks",),
    gives="records",
    mapped=True,
    asks=_asks,
    needs=_writes,
    files=("prompt",),
    check=_read_check,
)
REDUCE_TYPE = NodeType(ReduceParams, _reduce, _reduce_ceiling, takes=("records",), finishing=True)
ANSWER_TYPE = NodeType(
    AnswerParams,
    _answer,
    _answer_ceiling,
    takes=("chunks", "records", "answer"),
    asks=lambda site, scope: (answer_role(scope), scope.task.question),
    finishing=True,
    replies=lambda site: True,
    check=_answer_check,
)
