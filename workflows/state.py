"""What flows between nodes: the task, what a model wrote, and the small JSON that LangGraph checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

TaskKind = Literal["search", "summarise", "classify", "aggregate", "pairwise", "multi_hop"]
Part = Literal["all", "file", "chapter"]
Operation = Literal["list", "count", "sum", "min", "max"]


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked. `question` is the focus of a summary, or empty for a general one."""

    question: str
    kind: TaskKind = "search"
    per: Part = "all"  # summaries: one for all, for each file, or for each chapter
    labels: tuple[str, ...] = ()  # classify: the answers to choose from
    operation: Operation | None = None  # aggregate: what to do with the items; None: as the question says


@dataclass(frozen=True, slots=True)
class Record:
    """What one call gave, checked against its role's schema. `id` is the key of the leaf cache."""

    id: str
    role: str
    data: dict[str, Any]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What two nodes wrote under one key."""
    return {**old, **new}


class Input(TypedDict):
    """What a caller gives. `sources` are document ids; the texts are in the run's context."""

    question: str
    sources: list[str]


class Output(TypedDict):
    """The Answer as JSON."""

    answer: dict[str, Any]


class State(TypedDict, total=False):
    """Ids and numbers only: texts are in the run's documents, records in the leaf cache."""

    question: str
    sources: list[str]
    reads: Annotated[dict[str, str], merged]  # pack number -> record id
    failures: Annotated[dict[str, dict[str, Any]], merged]  # pack number -> Failure without text
    groups: list[list[str]]  # record ids that the next level of a reduce tree merges
    n_reads: int
    batch: list[int]  # [first, last + 1] of the read numbers that one Send carries
    route: str  # which edge to take next
    kept: list[int]  # passages chosen to be read
    scored: list[int]  # passages that the Reader ranked
    not_forwarded: int  # notes that were found and did not fit the next step
    draft: str  # id of the record that the answer is made of
    spans: list[list[Any]]  # [document id, start, end, score, producer]: evidence chosen without a call
    answer: dict[str, Any]
