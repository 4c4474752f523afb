"""What an end means to a shell: exit codes, and what is said on stderr in at most three lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentctx.memory.errors import AgentctxError, BudgetExceeded, ConfigError, InputError, ModelError

if TYPE_CHECKING:
    from agentctx.memory.types import Answer

OK, FAILURE, USAGE, INPUT, CITATIONS, BUDGET, MODEL = 0, 1, 2, 3, 4, 5, 6
INTERRUPTED, CLOSED_PIPE, TERMINATED = 130, 141, 143  # 128 + the signal
STOPPED = {"interrupted": INTERRUPTED, "closed pipe": CLOSED_PIPE, "terminated": TERMINATED}
_CODES = ((ConfigError, USAGE), (InputError, INPUT), (BudgetExceeded, BUDGET), (ModelError, MODEL))


def of_error(error: AgentctxError) -> int:
    """The exit code of a typed error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILURE)


def of_answer(answer: Answer, *, require_citations: bool) -> int:
    """The exit code of a run that gave an answer."""
    if answer.status == "partial":
        return STOPPED.get(answer.stopped_because or "", BUDGET)
    supported = all(citation.verdict == "supported" for citation in answer.citations)
    if require_citations and answer.status == "complete":
        return OK if supported and answer.citations and not answer.uncited else CITATIONS
    return OK


def explain(error: AgentctxError) -> str:
    """What was wrong and what to do, a line each."""
    from agentctx.memory.clean import one_line

    said = f"error: {one_line(error.message)}"
    return f"{said}\nhint: {one_line(error.hint)}" if error.hint else said
