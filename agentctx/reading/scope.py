"""A stretch of a conversation that can be taken back, so that only its conclusion goes on costing memory.

A finished subtask leaves the context and its result stays (Luo et al., "Beyond Context Limits: Subconscious
Threads for Long-Horizon Reasoning", arXiv 2507.16784), here as a rule that any step of a workflow can call.
Nothing is destroyed: what leaves is archived under its hash, and comes back token by token.
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Document

if TYPE_CHECKING:
    from agentctx.reading.branch import Branch


class Scope:
    """Made by `Branch.scope`: the tokens that the branch wrote since, until the `with` statement ends."""

    def __init__(self, branch: Branch, name: str) -> None:
        self.name = name
        self.start = len(branch.token_ids)
        self.end: int | None = None  # None while it is open
        self.archived: str | None = None  # the id of what was dropped, while it is closed
        self.lost = False  # it lay in another that was closed
        self._branch = branch
        self._dropped: str | None = None  # the same text, where there is no archive

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What stands in it now: its conclusion, once it is closed."""
        return self._branch.token_ids[self.start : self.end]

    def close(self, keep: str = "", *, mode: Literal["reread", "keep"] = "reread") -> str:
        """Drop what was written, but `keep`; returns the id of what was dropped in the archive.

        "reread" reads `keep` anew, and what came after the scope with it, so that nothing dropped lingers.
        "keep" computes nothing: `keep` must stand in the scope, and its keys and values, which have seen what
        is dropped, move to the front with those of what came after. Raises ConfigError for a scope that is
        closed, and a text that is not in it; ModelError: unsupported where keys cannot be moved, or spans
        were hidden since the scope began, out_of_memory. Then nothing has changed.
        """
        self._check(closed=False)
        branch, tokens = self._branch, self._branch.engine.tokens
        ids = self.token_ids
        end = self.start + len(ids)
        if mode == "keep":
            stays = tokens.spelling(ids, keep)
            kept = range(self.start + stays.start, self.start + stays.stop)
        elif mode == "reread":
            again = tokens.data(keep).ids
        else:
            raise ConfigError(f"there is no mode {mode!r}", hint="choose reread or keep")
        dropped = json.dumps({"text": tokens.backend.decode(list(ids)), "token_ids": ids}, ensure_ascii=False)
        archive = branch.engine.archive
        id = archive.put(dropped) if archive else Document.of(dropped).id
        if mode == "keep":
            branch.keep(self, end, kept)
        else:
            branch.replace(self, end, again)
        self.archived, self._dropped = id, None if archive else dropped
        return id

    def restore(self) -> None:
        """Bring back what was dropped, in the place of the conclusion; it and what came after is read again.

        Raises StoreError if the archive lost or changed it, ModelError: overflow, out_of_memory; then it is
        as it was.
        """
        self._check(closed=True)
        archive, id = self._branch.engine.archive, self.archived
        assert id is not None and self.end is not None
        found = self._dropped if self._dropped is not None or archive is None else archive.get(id)
        assert found is not None
        self._branch.replace(self, self.end, json.loads(found)["token_ids"])
        self.archived = self._dropped = None

    def shift(self, start: int, end: int, by: int, *, inner: bool) -> None:
        """The tokens `start` to `end` of the branch have become `by` more. `inner`: it began after what
        changed did.
        """
        if self.start >= end and (inner or start < end):
            self.start += by
        elif inner:
            self.lost = True
            return
        if self.end is not None and self.end >= end:
            self.end += by

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.end is None:
            self.end = len(self._branch.token_ids)

    def _check(self, *, closed: bool) -> None:
        if self.lost:
            raise ConfigError(f"the scope {self.name!r} lay in another that was closed")
        if (self.archived is not None) != closed:
            state = "open: nothing was dropped" if closed else "closed"
            raise ConfigError(f"the scope {self.name!r} is {state}")
