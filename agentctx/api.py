"""The Python API: open sources, then ask, summarise or plan.

    from agentctx import Context
    answer = Context.open("contract.pdf").ask("Which court ruled, and when?")

`aask`, `asummarize`, `astream` and `aresume` are the async forms; the plain ones are the same code in a loop
of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from agentctx.asked import Kind, task_of
from agentctx.attempt import carried_out
from agentctx.blocking import blocking, blocking_iterator
from agentctx.each import Each, Unit
from agentctx.memory.blobs import Blobs
from agentctx.memory.documents import Corpus, Selection
from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Answer, Budget, Notice, Plan
from agentctx.paths import KV_BYTES, Paths
from agentctx.privacy import kept_here, tracing_notices
from agentctx.runs import Runs
from agentctx.secret import kept_secret
from agentctx.sources import Source, corpus_of
from agentctx.workflows.conclude import ANSWER
from agentctx.workflows.fence import draw_tag
from agentctx.workflows.frame import Strategy
from agentctx.workflows.registry import strategy as named_strategy
from agentctx.workflows.run import Stop
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Part, Task
from agentctx.workflows.trace import Event

if TYPE_CHECKING:
    from agentctx.memory.kv.dtype import KVDtype
    from agentctx.models.load import Model
    from agentctx.models.table import Linears

__all__ = ["Context", "Stop"]
Progress = Callable[[str, int, int | None], None]
Listener = Callable[[Event], None]
UNLIMITED = Budget()


@dataclass(frozen=True)
class Context:
    """Documents and a model, ready to be asked. Make one with `Context.open`."""

    corpus: Corpus
    model: Model
    paths: Paths
    model_options: dict[str, Any] = field(default_factory=dict)  # how to open the model again
    ephemeral: bool = False
    offline: bool = False  # its runs are not traced by LangChain
    listed: bool = True  # its runs can be found and taken up again by their name

    @classmethod
    def open(
        cls,
        sources: Source | Sequence[Source] = (),
        *,
        text: str | None = None,
        model: str | Model = "smollm2",
        base_url: str | None = None,
        window: int | None = None,
        attention: str = "auto",
        exact: bool = False,
        linears: Linears = "auto",
        kv_dtype: KVDtype = "auto",
        selection: Selection | None = None,
        stdin: BinaryIO | None = None,
        paths: Paths | None = None,
        offline: bool = False,
        ephemeral: bool = False,
        kv_bytes: int = KV_BYTES,
        memory_bytes: int | None = None,
        concurrency: int | None = None,
        embed: str = "auto",
        progress: Progress | None = None,
    ) -> Context:
        """Read the sources and open the model.

        `sources`: files, directories, "-" for `stdin`, or `Document`s; `text`: a text itself. `model`: a name
        from `agentctx models ls`, a folder, a hub id, or "openai:NAME" with `base_url`; or an opened `Model`.
        `window`: use at most this many tokens of the model's context. `attention`: how a local model reads
        long texts, such as "quest:budget=2048"; "auto" is dense for now. `exact`: a sparse method only drafts
        answers, dense attention has the last word on each token. `linears`: the weights that a local
        model generates with, "bf16", "int4" (half the time a token, slightly less accurate) or "auto".
        `kv_dtype`: how what it has read is held in memory, "int8" and "int4" take a half and a quarter.
        `embed`: "minilm" finds passages by meaning too ("auto": if it is here). `ephemeral`: write nothing.
        `kv_bytes`: of disk, for what a local model has read, so that it is not read again; `memory_bytes`: of
        memory, for the model and what it reads (None: 60 % of what is free). `offline`: download nothing and
        upload no traces. `concurrency`: calls in flight at an endpoint (None: 8). Raises InputError if
        nothing can be read, ModelError or ConfigError for the model.
        """
        from agentctx.corpus.attach import with_index
        from agentctx.models.load import open_model

        corpus, paths = corpus_of(sources, text, selection or Selection(), stdin), paths or Paths.default()
        options: dict[str, Any] = {}
        if isinstance(model, str):
            options = {
                "name": model,
                "base_url": base_url,
                "window": window,
                "attention": attention,
                "exact": exact,
                "linears": linears,
                "kv_dtype": kv_dtype,
                "kv_bytes": 0 if ephemeral else kv_bytes,
                "memory_bytes": memory_bytes,
                "concurrency": concurrency,
                "embed": embed,
            }
            model = with_index(open_model(**options, paths=paths, offline=offline, progress=progress), paths)
        notices = (*corpus.warnings, *model.warnings, *tracing_notices(offline=offline))
        return cls(replace(corpus, warnings=notices), model, paths, options, ephemeral, offline)

    def plan(
        self,
        question: str | None,
        *,
        task: str = "ask",
        per: Part = "all",
        kind: Kind = "search",
        labels: Sequence[str] = (),
        strategy: str | Strategy = "auto",
        budget: Budget = UNLIMITED,
    ) -> Plan:
        """What `ask` (or, with `task="summarize"`, `summarize`) would cost at most. No model call is made."""
        chosen = _strategy(strategy)
        asked = task_of(question, task, per, kind, labels)
        return chosen.plan(self._scope(asked, chosen.allowed(budget)))

    def each(
        self,
        question: str,
        *,
        per: Unit = "file",
        chunk_tokens: int | None = None,
        kind: Kind = "search",
        labels: Sequence[str] = (),
        strategy: str | Strategy = "auto",
        budget: Budget = UNLIMITED,
    ) -> Each:
        """The same question to each document by itself, or with `per="chunk"` to each stretch of one.

        `.rows()` gives an answer for each as they come, `.arows()` the same as an async generator, `.plan()`
        what they cost at most. `budget` is for all together.
        """
        return Each(self, question, per, chunk_tokens, kind, labels, strategy, budget)

    async def aask(
        self,
        question: str,
        *,
        kind: Kind = "search",
        labels: Sequence[str] = (),
        strategy: str | Strategy = "auto",
        budget: Budget = UNLIMITED,
        run_id: str | None = None,
        stop: Stop | None = None,
        on_event: Listener | None = None,
    ) -> Answer:
        """Answer a question from the documents, with citations checked by code.

        `kind`: what sort of answer is wanted. "search" finds it in a part of the documents, "multi_hop" joins
        facts from several; "classify" chooses one of `labels`; "aggregate" lists, counts, adds or compares
        what all documents state; "pairwise" finds the pairs of things for which the question holds. The last
        three put what was found in `Answer.value`.

        `strategy`: a name, or an object with its parameters, `Spans(candidates=100)`. Raises BudgetExceeded
        (with the partial answer) when a limit ends the run, ModelError if the model cannot be reached.
        """
        task = task_of(question, "ask", "all", kind, labels)
        return await self._start(task, strategy, budget, run_id, stop, on_event)

    async def asummarize(
        self,
        focus: str | None = None,
        *,
        per: Part = "all",
        strategy: str | Strategy = "auto",
        budget: Budget = UNLIMITED,
        run_id: str | None = None,
        stop: Stop | None = None,
        on_event: Listener | None = None,
    ) -> Answer:
        """Summarise all documents, each file, or each chapter; `focus` says what matters."""
        return await self._start(task_of(focus, "summarize", per), strategy, budget, run_id, stop, on_event)

    async def astream(
        self, question: str, *, strategy: str | Strategy = "auto", budget: Budget = UNLIMITED
    ) -> AsyncGenerator[Event | Answer, None]:
        """The events of a run as they happen, and the Answer last. Leaving the loop cancels the run."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        stop = Stop()
        run = asyncio.create_task(
            self.aask(question, strategy=strategy, budget=budget, stop=stop, on_event=queue.put_nowait)
        )
        run.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            yield await run
        finally:
            if not run.done():
                stop.request("cancelled")
                stop.request("cancelled")
            await asyncio.gather(run, return_exceptions=True)

    async def _aresume(  # type: ignore[misc]  # a function until the two class methods below are made of it
        cls: type[Context],
        run_id: str,
        *,
        budget: Budget | None = None,
        paths: Paths | None = None,
        offline: bool = False,
        stop: Stop | None = None,
        on_event: Listener | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Take up a run that was killed, stopped or ended by its budget. No finished call is made again.

        What `budget` limits replaces the run's own limit. A run that is complete returns its answer at once.
        """
        from agentctx.corpus.attach import with_index
        from agentctx.models.load import open_model

        paths = paths or Paths.default()
        manifest = Runs(paths.runs).manifest(run_id)
        if manifest.get("answer") and manifest["status"] in ("complete", "unanswerable"):
            return ANSWER.validate_python(manifest["answer"])
        blobs = Blobs(paths.blobs)
        told = (Notice(**notice) for notice in manifest["warnings"])
        corpus = Corpus(
            tuple(blobs.get_document(document_id, source) for document_id, source in manifest["documents"]),
            tuple(Notice(**notice) for notice in manifest["skipped"]),
            tuple(notice for notice in told if notice.code != "tracing"),  # that is as it is today
        )
        if not manifest["model"].get("name"):
            raise ConfigError(
                f"run {run_id} used a model object that cannot be opened by name",
                hint="open a Context with that model and ask again; finished calls come from the cache",
            )
        model = open_model(**manifest["model"], paths=paths, offline=offline, progress=progress)
        model = with_index(model, paths)
        now = (*corpus.warnings, *model.warnings, *tracing_notices(offline=offline))
        corpus = replace(corpus, warnings=tuple(dict.fromkeys(now)))
        context = cls(corpus, model, paths, manifest["model"], offline=offline)
        task = Task(**{**manifest["task"], "labels": tuple(manifest["task"]["labels"])})
        strategy = named_strategy(manifest["strategy"], **manifest["params"])
        limits = asdict(budget or UNLIMITED)
        manifest["budget"] |= {name: limit for name, limit in limits.items() if limit is not None}
        # Always a new graph, from the cache: what checkpoints name by number may be cut otherwise today.
        manifest["attempt"] += 1
        allowed = strategy.allowed(Budget(**manifest["budget"]))
        scope = context._scope(task, allowed, manifest["tag"])
        with kept_here(offline):
            return await carried_out(context, run_id, manifest, scope, strategy, stop, on_event)

    ask = blocking(aask)
    summarize = blocking(asummarize)
    stream = blocking_iterator(astream)
    aresume = classmethod(_aresume)
    resume = classmethod(blocking(_aresume))

    def _scope(self, task: Task, budget: Budget, tag: str | None = None) -> Scope:
        documents = {document.id: document for document in self.corpus.documents}
        return Scope(
            task,
            documents,
            self.model.profile,
            self.model.counter,
            tag or draw_tag(documents.values(), secrets.token_bytes(16)),
            self.model.reader,
            budget,
            self.model.index,
            self.model.embedder,
        )

    async def _start(
        self,
        task: Task,
        strategy: str | Strategy,
        budget: Budget,
        run_id: str | None,
        stop: Stop | None,
        on_event: Listener | None,
    ) -> Answer:
        run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        chosen = _strategy(strategy)
        budget = chosen.allowed(budget)
        # Kept, so that what was read between these delimiters can be used again.
        tag = None if self.ephemeral else draw_tag(self.corpus.documents, kept_secret(self.paths.secret))
        scope = self._scope(task, budget, tag)
        manifest = {
            "task": asdict(task),
            "strategy": chosen.listed,
            "params": asdict(chosen),  # type: ignore[call-overload]
            "budget": asdict(budget),
            "model": self.model_options or {"name": ""},
            "documents": [[d.id, d.source] for d in self.corpus.documents],
            "skipped": [asdict(notice) for notice in self.corpus.skipped],
            "warnings": [asdict(notice) for notice in self.corpus.warnings],
            "tag": scope.tag,
            "started": time.time(),
            "attempt": 0,
        }
        if self.listed and not self.ephemeral:
            if (Runs(self.paths.runs).folder(run_id) / "run.json").exists():
                raise ConfigError(f"there is a run {run_id} already", hint=f"agentctx runs resume {run_id}")
            blobs = Blobs(self.paths.blobs)
            for document in self.corpus.documents:
                blobs.put_document(document)
        with kept_here(self.offline):
            return await carried_out(self, run_id, manifest, scope, chosen, stop, on_event)


def _strategy(given: str | Strategy) -> Strategy:
    return named_strategy(given) if isinstance(given, str) else given
