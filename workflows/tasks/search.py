"""Search: note what answers the question, then answer from the best 1, 2, 4, … notes until grounded.

Calls after the reads: at most ⌈log₂ L⌉ + 1. Doubling follows ExtAgents ("Scaling External Knowledge Input
Beyond Context Windows of LLMs via Multi-Agent Collaboration", arXiv 2505.21471).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from agentctx.memory.types import Stage
from agentctx.workflows import cost
from agentctx.workflows.answering import answer_input, answer_pieces, answer_role, is_grounded, pieces_of
from agentctx.workflows.cut import Cut
from agentctx.workflows.notes import (
    Note,
    best_first,
    keep_record,
    no_information,
    notes_of,
    spans_of,
)
from agentctx.workflows.profile import Tier
from agentctx.workflows.roles import READ, SHORT_ANSWER, Role
from agentctx.workflows.run import RunContext
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State
from agentctx.workflows.tasks.pipeline import SHOWN, Pipeline


@dataclass(frozen=True)
class Search(Pipeline):
    """A model that only reads gives a short answer to each chunk, and the best one is taken as it is."""

    needs: ClassVar[Tier] = "reads"

    def read_role(self, scope: Scope) -> Role:
        return scope.role(READ if scope.profile.writes else SHORT_ANSWER)

    def stages(self, scope: Scope, made: Cut) -> list[Stage]:
        return [doubling_stage(scope, len(made.reads))]

    async def finish(self, run: RunContext, state: State, made: Cut) -> dict[str, Any]:
        notes = await asyncio.to_thread(notes_of, run, made, state.get("reads", {}))
        return await answer_doubling(run, best_first(notes))


def doubling_stage(scope: Scope, reads: int) -> Stage:
    """Answers from 1, 2, 4, … reads' notes, each at its cap, never more than the window takes."""
    role = answer_role(scope)
    empty, output = answer_input(scope, [])
    if not scope.profile.writes:
        return cost.stage("answer", role.name, [], output, scope.profile)
    sizes = [min(2**k, reads) for k in range((reads - 1).bit_length() + 1)]
    room = scope.profile.window - output
    inputs = [min(room, empty + size * (scope.role(READ).max_output + 64)) for size in sizes]
    return cost.stage("answer", role.name, inputs, output, scope.profile, waves=len(inputs))


async def answer_doubling(run: RunContext, notes: Sequence[Note]) -> dict[str, Any]:
    """Answer from the notes, best first; the first answer that code finds grounded ends it."""
    if notes and not run.scope.profile.writes:
        return {"draft": keep_record(run, "note", {"text": notes[0].text}), "spans": spans_of(notes[:1])}
    best_reads = list(dict.fromkeys(note.read for note in notes))
    update: dict[str, Any] = {"draft": no_information(run)}
    size = 1
    while best_reads:
        chosen = [note for note in notes if note.read in best_reads[:size]]
        pieces = pieces_of(run.scope, chosen)
        update = await answer_pieces(run, pieces)
        update["not_forwarded"] = len(chosen) - len(pieces)
        if size >= len(best_reads) or await asyncio.to_thread(is_grounded, run, update):
            break
        size *= 2
    return update if "draft" in update else {**update, "spans": spans_of(notes[:SHOWN])}
