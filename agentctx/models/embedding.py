"""The `Embedder` of a run: vectors of texts, each made once and kept under the hash of its text.

`minilm` is fetched as the embedded model is, as data; a folder with another BERT does as well. The weights
are read when the first text is compared.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agentctx.memory.errors import ConfigError, StoreError
from agentctx.models.catalog import ensure, held
from agentctx.models.manifest import Manifest
from agentctx.models.table import EMBEDDINGS, MINILM
from agentctx.paths import Paths
from agentctx.workflows.ports import Scores

if TYPE_CHECKING:
    from agentctx.memory.vectors import Floats, Vectors
    from agentctx.models.bert import BertEncoder
    from agentctx.models.fetch import Progress

NONE, AUTO = "none", "auto"
DATABASE = "vectors.db"
_VERSION = 1
_TOGETHER = 64  # texts between two looks at whether anybody still waits, and what a killed run loses


def open_embedder(
    name: str, paths: Paths, *, keep: bool, offline: bool, progress: Progress
) -> Embedder | None:
    """The embedder of this name: `minilm`, fetched if it is not here, "auto" only if it is, "none" for none,
    or a folder. `keep`: vectors stay on disk. Raises ConfigError, and ModelError as `catalog.ensure` does.
    """
    if name == NONE or (name == AUTO and held(MINILM, paths) is None):
        return None
    if name == AUTO or name in EMBEDDINGS:
        entry = EMBEDDINGS.get(name, MINILM)
        folder = ensure(entry, paths, offline=offline, progress=progress)
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"there is no embedding model {name!r}",
                hint=f"known: {', '.join(EMBEDDINGS)}, {AUTO}, {NONE}; or name a folder",
            )
    return Embedder(folder, paths.embeddings if keep else None)


class Embedder:
    """Implements `ports.Embedder`. Vectors are kept under `store`; None: in memory."""

    def __init__(self, folder: Path, store: Path | None) -> None:
        self._folder, self._store = folder, store
        self._lock = threading.Lock()
        self._encoder: BertEncoder | None = None
        self._vectors: Vectors | None = None
        self._held: dict[str, Floats] = {}  # where there are no `_vectors`
        self._warnings: list[str] = []

    async def similarities(self, question: str, texts: Sequence[str]) -> Scores:
        """See `ports.Embedder`. Raises ModelError for a model that is damaged or is none."""
        abandoned = threading.Event()
        try:
            return await asyncio.to_thread(self._similarities, question, texts, abandoned)
        except asyncio.CancelledError:
            abandoned.set()  # the thread ends after the texts in hand
            raise

    def _similarities(self, question: str, texts: Sequence[str], abandoned: threading.Event) -> Scores:
        from agentctx.memory.kv.catalog import passage_name

        names = [passage_name(text) for text in texts]
        with self._lock:
            encoder = self._loaded()
            (query,) = encoder.encode([question])
            scores = self._known(query, list(dict.fromkeys(names)))
            fresh = {name: text for name, text in zip(names, texts, strict=True) if name not in scores}
            items = sorted(fresh.items(), key=lambda item: len(item[1]))
            for at in range(0, len(items), _TOGETHER):
                if abandoned.is_set():
                    break
                part = dict(items[at : at + _TOGETHER])
                rows = dict(zip(part, encoder.encode(list(part.values())), strict=True))
                self._keep(rows)
                scores |= {name: float(row @ query) for name, row in rows.items()}
            told, self._warnings = tuple(self._warnings), []
        return Scores(tuple(scores[name] for name in names if name in scores), 0, 0, told)

    def _loaded(self) -> BertEncoder:
        from agentctx.memory.database import Database
        from agentctx.memory.vectors import SCHEMA, Vectors
        from agentctx.models.bert import BertEncoder

        if self._encoder is None:
            manifest = Manifest.read(self._folder)
            if manifest is not None:
                manifest.verify(self._folder)
            self._encoder = BertEncoder.load(self._folder)
            if self._store is not None:
                own = manifest or Manifest.of(self._folder, name="", source="", dtype="")
                with self._disk():
                    database = Database(self._store / own.digest[:16] / DATABASE, SCHEMA, _VERSION)
                    self._vectors = Vectors(database, self._encoder.size)
        return self._encoder

    def _known(self, query: Floats, names: Sequence[str]) -> dict[str, float]:
        """How near those texts are whose vectors are kept."""
        if self._vectors is not None:
            with self._disk():
                hits = self._vectors.search(query, len(names), names)
                self._warnings += self._vectors.warnings
                self._vectors.warnings.clear()
                return {hit.owner: hit.score for hit in hits}
        return {name: float(self._held[name] @ query) for name in names if name in self._held}

    def _keep(self, rows: Mapping[str, Floats]) -> None:
        if self._vectors is not None:
            with self._disk():
                self._vectors.put({name: row[None] for name, row in rows.items()})
        else:
            self._held |= rows

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Go on in memory where the disk fails: vectors can be made again."""
        try:
            yield
        except StoreError as error:
            self._vectors = None
            self._warnings.append(f"vectors of texts are not kept: {error.message}; {error.hint}")
