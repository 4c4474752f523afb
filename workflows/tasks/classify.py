"""Classify: every chunk votes for a label and quotes why; a vote without a verified quote does not count.

Calls after the reads: none. Weights are the reads' own confidence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import Field

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Span, Stage
from agentctx.workflows.combine import vote
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import keep_record, no_information, places_of, verified
from agentctx.workflows.roles import Reply, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State
from agentctx.workflows.tasks.pipeline import Pipeline

CITED = 6  # quotes that are shown for the label that won


class LabelReply(Reply):
    """What one stretch of text speaks for."""

    example = MappingProxyType(
        {
            "label": "one of the labels",
            "quotes": ("words copied exactly from the text",),
            "confidence": 3,
            "no_information": False,
        }
    )

    joins = "quotes"

    label: str = Field(default="", max_length=200)
    quotes: list[str] = Field(default_factory=list, max_length=4)
    confidence: int = Field(default=0, ge=0, le=5)
    no_information: bool = False

    @classmethod
    def joined(cls, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The surest vote, with the quotes of those that agree with it: one read has one vote."""
        surest = max(records, key=lambda record: (not record["no_information"], record["confidence"]))
        label = surest["label"].strip().casefold()
        agreeing = [record for record in records if record["label"].strip().casefold() == label]
        return {**super().joined(agreeing), "no_information": surest["no_information"]}


LABEL = Role(
    "label",
    1,
    "You read part of a longer source and say which of the given labels it speaks for. You copy, character "
    "for character, the words that show it. confidence says from 0 to 5 how sure the text makes you. If the "
    "text does not bear on the question, set no_information to true.",
    LabelReply,
    200,
)


@dataclass(frozen=True)
class Classify(Pipeline):
    """The answer's `value` holds the label, its lead as a share of all weight, and every label's weight."""

    def question(self, scope: Scope) -> str:
        return labelled(scope.task.question, scope.task.labels)

    def read_role(self, scope: Scope) -> Role:
        return scope.role(LABEL)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        return []

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        draft, left_out = await asyncio.to_thread(
            elected, run, made, state.get("reads", {}), run.scope.task.labels
        )
        return {"draft": draft, "not_forwarded": left_out}


def labelled(question: str, labels: Sequence[str]) -> str:
    """The question with the labels to choose from."""
    if len({label.casefold() for label in labels}) < 2:
        raise ConfigError("a classification needs at least two labels", hint="--label yes --label no")
    return f"{question}\nLabels: {'; '.join(labels)}"


def elected(run: RunContext, made: Cut, reads: Mapping[str, str], given: Sequence[str]) -> tuple[str, int]:
    """The record of the label that the reads voted for, and how many of its quotes are not shown."""
    labels = {label.casefold(): label for label in given}
    records = run.cache.get_many(list(reads.values()))
    ballots: list[tuple[str, float]] = []
    places: dict[str, list[tuple[int, Span]]] = {}
    for number in sorted(map(int, reads)):
        data = records[reads[str(number)]]
        label = labels.get(data["label"].strip().casefold())
        if data["no_information"]:
            continue
        if label is None:
            run.warn("unknown_label", f"a read voted for {data['label']!r}, which is no label")
            continue
        spans = [made.chunks[i].span for i in made.reads[number].chunks]
        found = verified(run, data["quotes"], spans)
        if not found:
            run.warn("vote_without_quote", f"a vote for {label!r} quoted nothing that is in the text")
            continue
        ballots.append((label, float(max(1, data["confidence"]))))
        places.setdefault(label, []).extend((data["confidence"], span) for span in found)
    if not ballots:
        return no_information(run), 0
    winner, margin = vote(ballots, given)
    weights = {label: sum(w for of, w in ballots if of == label) for label in given}
    best = [span for _, span in sorted(places[winner], key=lambda place: -place[0])][:CITED]
    draft = {
        "text": winner,
        "claims": [{"text": winner, "quotes": [], "spans": places_of(best)}],
        "no_information": False,
        "value": {"label": winner, "margin": margin, "weights": weights},
    }
    return keep_record(run, "vote", draft), len(places[winner]) - len(best)
