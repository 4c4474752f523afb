"""From what a caller says to the task that a strategy does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from agentctx.memory.errors import ConfigError
from agentctx.workflows.state import Part, Task

Kind = Literal["search", "multi_hop", "classify", "aggregate", "pairwise"]


def task_of(
    question: str | None, task: str, per: Part = "all", kind: Kind = "search", labels: Sequence[str] = ()
) -> Task:
    """The task that `task` ("ask" or "summarize") names; ConfigError for what does not go together."""
    if task not in ("ask", "summarize"):
        raise ConfigError(f"there is no task {task!r}", hint="choose ask or summarize")
    if task == "ask" and not (question or "").strip():
        raise ConfigError("the question is empty")
    if per not in ("all", "file", "chapter"):
        raise ConfigError(f"there is no division per {per!r}", hint="choose all, file or chapter")
    kinds = get_args(Kind)
    if kind not in kinds:
        raise ConfigError(f"there is no kind of question {kind!r}", hint=f"choose {', '.join(kinds)}")
    if labels and kind != "classify":
        raise ConfigError(f"labels are for questions of kind classify, not {kind}")
    return Task((question or "").strip(), kind if task == "ask" else "summarise", per, tuple(labels))
