"""Map-reduce along the structure of the input: directory, file, chapter.

Inner nodes of the tree are the input's own parts, so a summary keeps one result per part and no read mixes
two files. A search reads file by file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Part
from agentctx.workflows.strategies.map_reduce import MapReduce


@dataclass(frozen=True)
class Recursive(MapReduce):
    """Like `map_reduce`, cut along files, or along chapters where there is one file only."""

    name: ClassVar[str] = "recursive"

    def per(self, scope: Scope) -> Part:
        if scope.task.per != "all":
            return scope.task.per
        return "file" if len(scope.documents) > 1 else "chapter"
