"""What planning and running look at: the task, the documents and the model's facts.

Everything derived from them (splits, packs, counted prompts) is computed once, deterministically, and kept,
so that the plan that is shown and the run that follows use the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from langchain_core.messages import BaseMessage

from agentctx.memory.types import Budget, Chunk, Document, Span
from agentctx.workflows.ports import Counter, Embedder, KVIndex, Reader
from agentctx.workflows.profile import ModelProfile
from agentctx.workflows.roles import Role
from agentctx.workflows.split import split_many
from agentctx.workflows.state import Task

T = TypeVar("T")
REPLY_SHARE = 5  # a reply may take a fifth of the window


@dataclass(frozen=True)
class Scope:
    """One task over one set of documents with one model. Documents keep the order they were opened in."""

    task: Task
    documents: Mapping[str, Document]
    profile: ModelProfile
    counter: Counter
    tag: str
    reader: Reader | None = None
    budget: Budget = Budget()
    index: KVIndex | None = None
    embedder: Embedder | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """The value under `key`, made on first use."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    def prompt_tokens(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens to reserve for a finished prompt; an estimate is raised by a quarter."""
        count = self.counter.count_messages(messages)
        return count if self.counter.exact else -(-count * 5 // 4)

    def role(self, role: Role) -> Role:
        """The role with its longest reply cut to a share of the window, so that there is room to read."""
        return replace(role, max_output=min(role.max_output, self.profile.window // REPLY_SHARE))

    def text_tokens(self, text: str) -> int:
        """Tokens of a bare text, raised by a quarter where the counter estimates."""
        count = self.counter.count_text(text)
        return count if self.counter.exact else -(-count * 5 // 4)

    def assumptions(self, *, reads: bool = False) -> list[str]:
        """What a plan takes for true of the model; `reads`: it reads chunk by chunk."""
        told = [] if self.counter.exact else ["tokens are estimated and raised by a quarter"]
        if reads and self.profile.kind == "endpoint":
            told.append(
                f"the endpoint takes {self.profile.context:,} tokens; a read that it refuses as too long is "
                "read in halves, each time for two of the extra attempts"
            )
        return told

    def text(self, span: Span) -> str:
        return self.documents[span.document_id].text[span.start : span.end]

    def label(self, span: Span) -> str:
        return self.documents[span.document_id].source

    def holders(self, text: str) -> list[str]:
        """The sources of the documents that hold `text`, or else its last line, or what follows a heading in
        it; of all documents if it is in none as it is.
        """
        line = text.rpartition("\n")[2]
        for piece in (text, line, line.partition(": ")[2]):
            if found := [one.source for one in self.documents.values() if piece and piece in one.text]:
                return found
        return self.labels()

    def labels(self) -> list[str]:
        return [document.source for document in self.documents.values()]

    def whole(self) -> list[Chunk]:
        """Each document as one chunk."""
        return self.keep(
            "whole",
            lambda: [
                Chunk(Span(d.id, 0, len(d.text)), self.counter.count_text(d.text))
                for d in self.documents.values()
            ],
        )

    def chunks(self, limit: int) -> list[Chunk]:
        """All documents split into chunks of at most `limit` tokens, in order."""
        return self.keep(
            ("chunks", limit),
            lambda: split_many(list(self.documents.values()), limit, self.counter),
        )
