"""Stands in for `agentctx.api`, so that the command line is tested without a model.

It reads real files with the real loaders. The question says what happens. As a script it is the command line
with this module in the place of the API: `python scripted_api.py ask …`.
"""

import os
import sys
import time
from types import SimpleNamespace

from agentctx.memory.documents import open_documents
from agentctx.memory.errors import AgentctxError, BudgetExceeded, ConfigError, ModelError
from agentctx.memory.types import Answer, Citation, Cost, Coverage, Notice, Plan, Span, Stage, Usage
from agentctx.workflows.profile import ModelProfile

CEILING = Cost(3, 900, 120)
PLAN = Plan("spans", {}, (Stage("read", "reader", CEILING, 1, 2.0),), CEILING, 2.0, 1, Cost(), 1.0, 9)


class Stop:
    def __init__(self):
        self.reason = None
        self.cancelled = False

    def request(self, reason):
        self.cancelled = self.reason is not None
        self.reason = self.reason or reason


class Context:
    opened = None  # the keyword arguments of the last `open`
    strategy = None  # of the last `ask`
    divided = None  # the keyword arguments of the last `each`

    def __init__(self, corpus, model):
        self.corpus, self.name = corpus, model
        self.model = SimpleNamespace(profile=ModelProfile(model, "scripted", "f00", 8192))

    @classmethod
    def open(cls, sources, *, model, selection, stdin, **rest):
        cls.opened = {"sources": sources, "model": model, **rest}
        if model == "absent":
            raise ModelError("no model 'absent'", code="not_fetched", hint="agentctx models ls")
        return cls(open_documents(sources, selection=selection, stdin=stdin), model)

    def plan(self, question, *, task, per, kind, labels, strategy, budget):
        if budget.calls == 0:
            raise ConfigError("no call fits")
        return PLAN

    def ask(self, question, *, kind, labels, strategy, budget, run_id, stop, on_event):
        type(self).strategy = strategy
        if kind != "search":
            question = f"{kind} {'|'.join(labels)}: {question}"
        return self._run(question, run_id or "01RUN", stop, on_event)

    def each(self, question, **rest):
        """Each file is asked what stands in its first line, or else `question`."""
        from agentctx.each import Row  # not above: commands that need it not start sooner without it

        type(self).divided = rest

        def rows(*, stop, on_event):
            for document in self.corpus.documents:
                one = Context(SimpleNamespace(documents=(document,), skipped=(), warnings=()), self.name)
                first = document.text.splitlines()[0]
                asked = first if first in ("budget", "down", "nothing fits") else question
                answer = error = None
                try:
                    answer = one._run(asked, "01RUN", stop, on_event)
                except AgentctxError as failed:
                    answer, error = getattr(failed, "partial", None), failed
                yield Row(document.source, Span(document.id, 0, len(document.text)), answer, error)

        return SimpleNamespace(rows=rows, plan=lambda: PLAN)

    def summarize(self, focus, *, per, strategy, budget, run_id, stop, on_event):
        return self._run(f"summary per {per} of {focus}", run_id or "01RUN", stop, on_event)

    @classmethod
    def resume(cls, run_id, *, budget, offline, stop, on_event, progress):
        cls.resumed_with = budget
        return cls(SimpleNamespace(documents=(), skipped=(), warnings=()), "smollm2")._run(
            "resumed", run_id, stop, on_event
        )

    def _run(self, question, run_id, stop, on_event):
        for seq, name in enumerate(("run.start", "node.start", "call.start", "token", "call.end"), 1):
            on_event(event(run_id, seq, name))
        match question:
            case "noise":
                print("from Python")
                os.write(1, b"from C\n")
            case "bug":
                raise TypeError("the secret of the bug")
            case "down":
                raise ModelError("http://127.0.0.1:1 refused the connection", hint="start it\nor not")
            case "budget":
                raise BudgetExceeded(
                    "3 of 3 calls are spent", partial=self._answer("so far", run_id, "partial")
                )
            case "nothing fits":
                raise BudgetExceeded("one call needs 900 tokens, 10 are allowed")
            case "wait":
                return self._wait(run_id, stop)
            case "flood":
                seq = 6
                while not stop.cancelled:
                    on_event(event(run_id, seq := seq + 1, "evidence"))
                return self._answer("", run_id, "partial", stopped_because=stop.reason)
            case "unanswerable":
                return self._answer("", run_id, "unanswerable")
            case "unsupported":
                lost = Citation("a.txt", None, "never written", "not_found")
                return self._answer("A claim [1].", run_id, "complete", citations=(lost,), uncited=1)
        return self._answer(question, run_id, "complete", citations=self._citations())

    def _wait(self, run_id, stop):
        print("ready", file=sys.stderr, flush=True)
        deadline = time.monotonic() + 20
        while not stop.reason and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._answer("so far", run_id, "partial", stopped_because=stop.reason)

    def _citations(self):
        found = []
        for document in self.corpus.documents:
            quote = document.text.splitlines()[0]
            found.append(Citation(document.source, Span(document.id, 0, len(quote)), quote, "supported"))
        return tuple(found)

    def _answer(self, text, run_id, status, citations=(), **rest):
        total = sum(len(document.text.split()) for document in self.corpus.documents)
        coverage = Coverage(total, total, skipped=self.corpus.skipped)
        usage = Usage(2, 300, 20, 0.5)
        warnings = (*self.corpus.warnings, Notice("window_uncalibrated", "the window was not probed"))
        return Answer(
            text, citations, coverage, "spans", self.name, usage, PLAN, run_id, status, warnings, **rest
        )


def event(run_id, seq, name):
    fields = {"run_id": run_id, "seq": seq, "time": 0.0, "span": "1", "parent": "0", "node": "read"}
    fields |= {"event": name, "data": {}}
    return SimpleNamespace(**fields, as_dict=lambda: fields)


if __name__ == "__main__":
    sys.modules["agentctx.api"] = sys.modules["__main__"]
    from agentctx.cli.main import main

    main()
