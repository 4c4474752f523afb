"""What the conformance suite runs: every strategy of the registry on every kind of task it says it does.

Nothing here names a strategy. What one can do is read off its `kinds` and `needs`, so a new one is tested by
being listed.
"""

import random
import re
from dataclasses import dataclass, replace

from agentctx.api import Context
from agentctx.memory.errors import InputError
from agentctx.memory.types import Cost, Document
from agentctx.paths import Paths
from agentctx.testing import ScriptedChat, ScriptedReader, WordCounter, finding, scripted_model
from agentctx.workflows.profile import ModelProfile
from agentctx.workflows.registry import STRATEGIES, strategy
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import Task

QUESTION = "What is the code of Zed?"
FACT = r"The code of (\w+ is \w+)\."
LABELS = ("stated", "not stated")
ABLE = frozenset({"reads", "writes", "judges", "plans"})
WEAK = frozenset({"reads"})
WINDOW = 1500


@dataclass(frozen=True)
class Case:
    strategy: str
    kind: str

    def __str__(self):
        return f"{self.strategy}-{self.kind}"

    def options(self):
        return {"labels": LABELS} if self.kind == "classify" else {}

    def plan(self, ctx, **options):
        if self.kind == "summarise":
            return ctx.plan(QUESTION, task="summarize", strategy=self.strategy, **options)
        return ctx.plan(QUESTION, kind=self.kind, strategy=self.strategy, **self.options(), **options)

    def run(self, ctx, *, strategy=None, **options):
        """The answer; `strategy` takes the place of the case's own."""
        strategy = strategy or self.strategy
        if self.kind == "summarise":
            return ctx.summarize(QUESTION, strategy=strategy, **options)
        return ctx.ask(QUESTION, kind=self.kind, strategy=strategy, **self.options(), **options)

    def needs(self):
        """What the strategy asks of a model that can only read, for this kind of task."""
        document = Document.of("one two three")
        task = Task(QUESTION, self.kind, labels=LABELS)
        profile = ModelProfile("m", "scripted", "f", WINDOW, tiers=WEAK)
        return strategy(self.strategy).needs(
            Scope(task, {document.id: document}, profile, WordCounter(), "t")
        )

    def tiers(self):
        """Kinds of models that are good enough for it."""
        return [ABLE, WEAK] if self.needs() == "reads" else [ABLE]


def haystack(sentences=300, *, facts=("Zed is K77", "Yan is Q12"), seed=0):
    """Sentences that all differ, one line, with the facts in the first and the last third."""
    rng = random.Random(seed)
    lines = [f"Sentence {n} speaks of {rng.choice('abcdefgh') * 5} and no more." for n in range(sentences)]
    for place, fact in enumerate(facts):
        lines[sentences // 3 + place * sentences // 3] = f"The code of {fact}."
    return " ".join(lines)


def sentences_of(text):
    return [match[0] for match in re.finditer(r"[^.]+\.", text)]


def chat_of(**options):
    return ScriptedChat(reply=finding(FACT), **options)


def opened(chat, text, *, tiers=ABLE, window=WINDOW, paths=None):
    """A context whose model reads `window` tokens reliably and accepts many more."""
    reader = ScriptedReader(lambda question, text: float("Zed" in text)) if tiers == WEAK else None
    model = scripted_model(chat, context=40_000, reliable=window, tiers=tiers, reader=reader)
    return Context.open([Document.of(text, "hay.txt")], model=model, ephemeral=paths is None, paths=paths)


def paths_in(folder):
    return Paths(*(folder / name for name in ("cache", "data", "state", "config")))


def spent(answer):
    return Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)


def shape(answer):
    """The answer without what differs between two equal runs: its name and its time."""
    return replace(answer, run_id="", usage=replace(answer.usage, seconds=0.0))


def _takes_what_is_long(name):
    """False for a strategy that refuses what does not fit its window: its own tests are of what fits."""
    try:
        opened(chat_of(), haystack(600)).plan(QUESTION, strategy=name)
    except InputError:
        return False
    return True


CASES = [
    Case(name, kind) for name in STRATEGIES if _takes_what_is_long(name) for kind in strategy(name).kinds
]
# One of each strategy, and one of each kind of task, where a run is costly.
EACH = [
    case for case in CASES if case.kind == strategy(case.strategy).kinds[0] or case.strategy == "map_reduce"
]
# Those that leave to `direct` what fits one call; the others have a one-call form of their own.
YIELDING = [case for case in CASES if strategy(case.strategy).gives_way]
