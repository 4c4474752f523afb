"""What was found so far, as a piece that a later call is shown beside its text.

Findings are words of the sources, so they stand between delimiters like any text.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentctx.workflows.notes import Note
from agentctx.workflows.roles import Role
from agentctx.workflows.scope import Scope

LABEL = "found elsewhere in the sources"


def room_for(tokens: int) -> int:
    """What to keep free in a prompt for them: tokens of joined texts may exceed the sum of theirs."""
    return tokens * 5 // 4


def findings(scope: Scope, role: Role, notes: Sequence[Note], tokens: int) -> str:
    """The quotes of the best notes, as many whole ones as add at most `tokens` to a prompt of `role`.

    Of a first one that is too long by itself, its beginning.
    """

    def added(lines: Sequence[str]) -> int:
        shown = role.render(scope.task.question, [(LABEL, "\n".join(lines))], scope.tag)
        return scope.prompt_tokens(shown) - scope.prompt_tokens(
            role.render(scope.task.question, [], scope.tag)
        )

    lines: list[str] = []
    for span in (span for note in notes for span in note.spans):
        line = " ".join(scope.text(span).split())
        if line in lines:
            continue
        if lines and added([*lines, line]) > tokens:
            break
        lines.append(line)
    while lines[0] and added(lines) > tokens:
        lines = [lines[0][: len(lines[0]) * 3 // 4]]
    return "\n".join(lines)
