"""What an acting model has done and seen, entry by entry. Nothing that leaves its sight is destroyed.

An entry's text is a record of the store under its content's hash; the log holds ids, titles and sizes. A live
entry is shown in full, an archived one by a line of the index, and it can be brought back byte for byte. Ids
are never used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentctx.memory.types import Span
from agentctx.workflows.notes import keep_record
from agentctx.workflows.run import RunContext


@dataclass(frozen=True, slots=True)
class Entry:
    """`key` is the record of its text."""

    id: str
    title: str
    key: str
    tokens: int
    live: bool = True


class WorkLog:
    """The entries of one run, and the stretches of the sources that they showed."""

    def __init__(self, run: RunContext, key: str | None = None) -> None:
        """`key`: the record that `kept` gave; None begins."""
        self._run = run
        data = run.cache.get(key) if key else None
        self.entries = [Entry(**entry) for entry in data["entries"]] if data else []
        self.shown = [Span(*place) for place in data["shown"]] if data else []

    def kept(self) -> str:
        """The log as a record."""
        places = [[span.document_id, span.start, span.end] for span in self.shown]
        entries = [asdict(entry) for entry in self.entries]
        return keep_record(self._run, "log", {"entries": entries, "shown": places})

    def add(self, title: str, text: str, shown: Sequence[Span] = ()) -> Entry:
        """Append a live entry."""
        key = keep_record(self._run, "entry", {"text": text})
        number = len(self.entries) + 1
        entry = Entry(f"e{number}", " ".join(title.split())[:120], key, self._run.scope.text_tokens(text))
        self.entries.append(entry)
        self.shown += [span for span in shown if span not in self.shown]
        return entry

    def text(self, entry: Entry) -> str:
        record: dict[str, Any] | None = self._run.cache.get(entry.key)
        if record is None:
            raise KeyError(f"the record of entry {entry.id} is not in the store")
        return str(record["text"])

    def entry(self, wanted: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.id == wanted), None)

    def archive(self, wanted: str, title: str = "") -> bool:
        """Show an entry by its line only; False if there is none of that id."""
        for at, entry in enumerate(self.entries):
            if entry.id == wanted:
                title = " ".join(title.split())[:120] or entry.title
                self.entries[at] = replace(entry, live=False, title=title)
                return True
        return False

    @property
    def live(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.live]

    def index(self, most: int) -> str:
        """A line for each archived entry, the last `most`."""
        lines = [f"{entry.id}: {entry.title}" for entry in self.entries if not entry.live]
        left_out = [f"({len(lines) - most} earlier ones: search_archive)"] if len(lines) > most else []
        return "\n".join([*left_out, *lines[-most:]])
