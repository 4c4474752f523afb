"""How often is what answers among the first 1, 5 and 20? By words, vectors, likelihood, attention, keys.

    python benchmarks/retrieval.py DATA_DIR --questions 40 --minutes 25

Sets: questions of Natural Questions with the gold passage among 20, 100 and 1,000 passages
(`lost_in_the_middle` holds 598; paragraphs of HotpotQA, Wikipedia as well, make up the thousand); HotpotQA,
the supporting two of ten paragraphs; QMSum, the passages of a meeting that overlap the gold turns; needles,
the passage that holds one of many facts about many people between sentences of `squality` stories;
`examples` and `debian_docs`, questions that share few words with what answers them (`finding.py`). The
hundred questions on which constants were chosen (`finding.py`) are left out.

Rankers: BM25; MiniLM; the model's likelihood, its attention through calibrated heads, both over the best 50
of the first stage; its keys (`agentctx.corpus.keys`); and fusions, `+` naming what goes in: "words" is the
first stage of `spans`, and words+likelihood is `spans` as it ships. Attention goes by blocks of ten passages
that were read by themselves and composed, so that every passage is read once.

R@k counts the gold passages among the first k, of those that k places can hold. Intervals are 95 % bootstrap
intervals over questions; differences are paired. A stopped run goes on where it was: a
line per question stands in a JSON Lines file beside the output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finding import DEVELOPMENT, paraphrases

from agentctx.corpus.keys import QUESTIONS, Measure, unrotated
from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Document, Span
from agentctx.models.embedding import open_embedder
from agentctx.models.fetch import announce
from agentctx.models.load import open_model
from agentctx.paths import Paths
from agentctx.reading.engine import Engine
from agentctx.reading.frame import turn
from agentctx.reading.needles import haystack
from agentctx.reading.reading import Reading
from agentctx.workflows.ports import Scores
from agentctx.workflows.rank import CANDIDATES, LEXICAL_WEIGHT, FirstStage, rank
from agentctx.workflows.split import split
from agentctx.workflows.strategies.kv_retrieval import _fused

SETS = ("nq_20", "nq_100", "nq_1000", "hotpotqa", "qmsum", "needles", "examples", "debian_docs")
SHIPPED = "words+likelihood"
RANKERS = (
    "bm25",
    "words",
    "minilm",
    "likelihood",
    "attention",
    "keys",
    "words+minilm",
    SHIPPED,
    "words+minilm+likelihood",
    "words+keys+likelihood",
)
COSTLY = ("likelihood", "attention", "keys")  # each with its fusions
AT = (1, 5, 20)
PASSAGE = 200  # tokens, as `spans` and an index cut
BLOCK = 10  # passages that attention looks at together
OPEN = 400  # readings that are held
MEMORY = 6 << 30  # bytes of the model and what it has read
PEOPLE, HAYSTACK = 8, 12_000  # of a text with needles; tokens
RESAMPLES = 10_000


@dataclass(frozen=True)
class Item:
    """One question, the passages of its set, the right ones, and the corpus that the passages belong to."""

    set: str
    id: str
    question: str
    texts: tuple[str, ...]
    gold: frozenset[int]
    corpus: str


def natural(data: Path, sizes: dict[str, int]) -> Iterator[list[Item]]:
    rows = [json.loads(line) for line in (data / "lost_in_the_middle/nq_oracle.jsonl").open()]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    own = list(dict.fromkeys(row["context"] for row in rows))
    others = [text for row in hotpot_rows(data) for text in row["context"].split("\n\n")]
    pool = tuple(dict.fromkeys([*own, *others]))
    for row in [rows[number] for number in order[DEVELOPMENT:]]:
        drawn = random.Random(row["id"])
        apart = [text for text in own if text != row["context"]]
        items = []
        for name, size in sizes.items():
            few = [row["context"], *drawn.sample(apart, min(size, len(own)) - 1)]
            drawn.shuffle(few)
            texts = pool[:size] if size > len(own) else tuple(few)
            gold = frozenset({texts.index(row["context"])})
            items.append(Item(name, row["id"], row["question"], texts, gold, "wikipedia"))
        yield items


def hotpot_rows(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "hotpotqa/distractor100.jsonl").open()]


def hotpot(data: Path) -> Iterator[Item]:
    for row in hotpot_rows(data):
        texts = tuple(row["context"].split("\n\n"))
        named = set(row["supporting"]["title"])
        gold = frozenset(i for i, text in enumerate(texts) if text.partition("\n")[0] in named)
        yield Item("hotpotqa", row["id"], row["question"], texts, gold, "wikipedia")


def qmsum(data: Path, counter: Any) -> Iterator[Item]:
    """Questions with gold turns, one meeting after the other."""
    rows = [json.loads(line) for line in (data / "qmsum/val.jsonl").open()]
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("evidence_turns"):
            asked.setdefault(row["document"], []).append(row)
    turns = zip_longest(*(asked[name] for name in sorted(asked)))
    cut: dict[str, tuple[list[Span], tuple[str, ...], list[tuple[int, int]]]] = {}
    for row in (row for line in turns for row in line if row is not None):
        name = row["document"]
        if name not in cut:
            document = Document.of((data / "qmsum" / name).read_text(encoding="utf-8"))
            spans = [chunk.span for chunk in split(document, PASSAGE, counter)]
            cut[name] = spans, tuple(document.text[s.start : s.end] for s in spans), lines(document.text)
        spans, texts, places = cut[name]
        right = [
            (places[int(first)][0], places[min(int(last), len(places) - 1)][1])
            for first, last in row["evidence_turns"]
        ]
        gold = frozenset(i for i, s in enumerate(spans) if any(s.start < b and a < s.end for a, b in right))
        yield Item("qmsum", row["id"], row["question"], texts, gold, "qmsum")


def lines(text: str) -> list[tuple[int, int]]:
    """Where the turns of a meeting begin and end: `[n] Speaker: ...`, one a line."""
    found, start = [], 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not line.startswith(f"[{number}]"):
            raise SystemExit(f"line {number} of a meeting is not turn {number}: {line[:40]!r}")
        found.append((start, start + len(line)))
        start += len(line)
    return found


def needles(data: Path, counter: Any) -> Iterator[Item]:
    """Questions about two texts in turn, each with the kinds of facts of one half."""
    prose = [path.read_text(encoding="utf-8") for path in sorted((data / "squality/docs").iterdir())]
    filler = [" ".join(one[a:b].split()) for one in prose for a, b in sentences(one) if 20 <= b - a <= 300]
    found: list[list[Item]] = []
    for half in (0, 1):
        draw = random.Random(f"retrieval {half}")
        hay = haystack(draw, HAYSTACK, counter.count_text, half=half, people=PEOPLE, filler=filler)
        spans = [chunk.span for chunk in split(Document.of(hay.text), PASSAGE, counter)]
        texts = tuple(hay.text[s.start : s.end] for s in spans)
        chosen = draw.sample(hay.needles, len(hay.needles))
        found.append(
            [
                Item("needles", f"{half} {one.question}", one.question, texts, gold, "needles")
                for one in chosen
                if (gold := frozenset(i for i, s in enumerate(spans) if s.start <= one.start < s.end))
            ]
        )
    return (item for pair in zip(*found, strict=True) for item in pair)


def whole_collection(data: Path, name: str) -> Iterator[Item]:
    """The paraphrased questions about one collection."""
    for item in paraphrases(data):
        if (item.task, item.split) == ("paraphrase_all", name):
            yield Item(name, item.id, item.question, item.texts, item.gold, name)


def items(data: Path, counter: Any, chosen: Sequence[str], count: int) -> Iterator[Item]:
    """One question of each set after the other, so that a run that stops early has all of them."""
    sizes = {name: int(name.removeprefix("nq_")) for name in chosen if name.startswith("nq_")}
    others = {
        "hotpotqa": lambda: hotpot(data),
        "qmsum": lambda: qmsum(data, counter),
        "needles": lambda: needles(data, counter),
        "examples": lambda: whole_collection(data, "examples"),
        "debian_docs": lambda: whole_collection(data, "debian_docs"),
    }
    streams: list[Iterator[list[Item]]] = [natural(data, sizes)]
    streams += [([item] for item in others[name]()) for name in chosen if name in others]
    for line in islice(zip_longest(*streams, fillvalue=[]), count):
        yield from (item for group in line for item in group)


class Memo:
    """A `Reader` that is asked for the likelihood of a text once."""

    def __init__(self, reader: Any, question: str) -> None:
        self.reader, self.question = reader, question
        self.known: dict[str, float] = {}

    async def likelihood(self, question: str, texts: Sequence[str], sources: Any = ()) -> Scores:
        fresh = [text for text in dict.fromkeys(texts) if text not in self.known]
        found = await self.reader.likelihood(question, fresh)
        self.known |= dict(zip(fresh, found.values, strict=True))
        return Scores(tuple(self.known[text] for text in texts), 0, 0)

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        return int(self.reader.likelihood_cost(question, texts))


class Keys:
    """The vectors that an index would hold of a corpus: read as it reads, measured by its first passages."""

    TOGETHER = 32  # passages, as `corpus.index`

    def __init__(self, chat: Any) -> None:
        self.engine, self.tokenizer = chat.weights.engine, chat.weights.tokenizer
        self.before = self.tokenizer.encode(turn(chat.template)[0])
        self.measure: Measure | None = None
        self.vectors: dict[str, Any] = {}

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        fresh = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        for at in range(0, len(fresh), self.TOGETHER):
            part = fresh[at : at + self.TOGETHER]
            keys = self.read(part)
            if self.measure is None:
                self.measure = Measure.of(keys, self.read(QUESTIONS))
            self.vectors |= {text: self.measure.passage(one) for text, one in zip(part, keys, strict=True)}
        assert self.measure is not None
        (asked,) = self.read([question])
        query = self.measure.question(asked)
        return [float((self.vectors[text] @ query).max()) for text in texts]

    def read(self, texts: Sequence[str]) -> list[torch.Tensor]:
        ids = self.tokenizer.encode_all(texts)
        contexts = self.engine.read_all([[*self.before, *one] for one in ids])
        try:
            first = len(self.before)
            return [
                unrotated(self.engine, context, first, len(one))
                for context, one in zip(contexts, ids, strict=True)
            ]
        finally:
            for context in contexts:
                context.close()


class Attention:
    """Passages by what a question attends to, in blocks composed of readings of one passage each."""

    def __init__(self, chat: Any) -> None:
        self.engine = Engine(chat.weights)
        self.prefix = turn(chat.template)[0]
        self.readings: OrderedDict[str, Reading] = OrderedDict()

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for at in range(0, len(texts), BLOCK):
            readings = [self.reading(text) for text in texts[at : at + BLOCK]]
            documents = [reading.texts[0].document for reading in readings]
            spans = [Span(one.id, 0, len(one.text)) for one in documents if one]
            with self.engine.compose(readings) as block:
                scored = block.score_spans(question, spans, method="attention")
            by_id = {one.span.document_id: one.score for one in scored}
            found += [by_id[span.document_id] for span in spans]
        while len(self.readings) > OPEN:
            self.readings.popitem(last=False)[1].close()
        return found

    def reading(self, text: str) -> Reading:
        if text not in self.readings:
            self.readings[text] = self.engine.read(Document.of(text), prefix=self.prefix, keep=False)
        self.readings.move_to_end(text)
        return self.readings[text]


class Bench:
    """All rankers over one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.attention = Attention(model.chat)
        self.keys: dict[str, Keys] = {}
        self.indexes: OrderedDict[tuple[str, ...], tuple[Lexical, FirstStage]] = OrderedDict()

    def index(self, texts: tuple[str, ...]) -> tuple[Lexical, FirstStage]:
        if texts not in self.indexes:
            self.indexes[texts] = Lexical(texts), FirstStage(texts)
        while len(self.indexes) > 24:  # the meetings, the texts with needles and the collections stay
            self.indexes.popitem(last=False)
        self.indexes.move_to_end(texts)
        return self.indexes[texts]

    async def orders(self, item: Item, wanted: Sequence[str]) -> dict[str, Sequence[int]]:
        """The passages of an item by each of these groups of rankers."""
        question, texts = item.question, item.texts
        bm25, first = self.index(texts)
        memo, embedder = Memo(self.model.reader, question), self.model.embedder
        words = first.scores(question)
        behind = sorted(range(len(texts)), key=lambda i: -words[i])
        near = (await embedder.similarities(question, texts)).values
        found: dict[str, Sequence[int]] = {
            "bm25": bm25.top(question, len(texts)),
            "words": behind,
            "minilm": sorted(range(len(texts)), key=lambda i: -near[i]),
            "words+minilm": (await rank(question, texts, reader=None, first=first, embedder=embedder)).order,
        }
        if "likelihood" in wanted:
            shipped = await rank(question, texts, reader=memo, first=first)
            found["likelihood"] = by(dict(zip(shipped.scored, shipped.likelihoods, strict=True)), behind)
            found[SHIPPED] = shipped.order
            both = await rank(question, texts, reader=memo, first=first, embedder=embedder)
            found["words+minilm+likelihood"] = both.order
        if "attention" in wanted:
            chosen = behind[:CANDIDATES]
            looked = self.attention.scores(question, [texts[i] for i in chosen])
            found["attention"] = by(dict(zip(chosen, looked, strict=True)), behind)
        if "keys" in wanted:
            keys = self.keys.setdefault(item.corpus, Keys(self.model.chat)).scores(question, texts)
            found["keys"] = sorted(range(len(texts)), key=lambda i: -keys[i])
            order = _fused([words, keys], len(texts))
            chosen = order[:CANDIDATES]
            seen = await memo.likelihood(question, [texts[i] for i in chosen])
            pairs = zip(chosen, seen.values, strict=True)
            scored = {i: value + LEXICAL_WEIGHT * words[i] for i, value in pairs}
            found["words+keys+likelihood"] = by(scored, order)
        return found


def by(scores: dict[int, float], behind: Sequence[int]) -> list[int]:
    """By score; those without one stand behind."""
    return sorted(behind, key=lambda i: -scores.get(i, float("-inf")))


def measure(
    bench: Bench, chosen: Iterator[Item], wanted: Sequence[str], log: Path, minutes: float
) -> list[dict[str, Any]]:
    """A line for each question: the places of the gold passages by each ranker, from 0.

    A question that lacks rankers which are wanted is asked again, for those.
    """
    lines = [json.loads(line) for line in log.open()] if log.exists() else []
    done = {(row["set"], row["id"]): row for row in lines}
    began = time.monotonic()
    with log.open("a") as out:
        for item in chosen:
            known = done.get((item.set, item.id), {}).get("places", {})
            if known and not set(wanted) - set(known):
                continue
            if time.monotonic() - began > 60 * minutes:
                break
            started = time.perf_counter()
            orders = asyncio.run(bench.orders(item, [name for name in wanted if name not in known]))
            row = {
                "set": item.set,
                "id": item.id,
                "passages": len(item.texts),
                "places": known
                | {
                    name: [place for place, i in enumerate(order) if i in item.gold]
                    for name, order in orders.items()
                },
                "seconds": round(time.perf_counter() - started, 2),
                "load": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(row), file=out, flush=True)
            done[item.set, item.id] = row
    return list(done.values())


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per set and ranker R@1, R@5, R@20, each with its difference from what ships."""
    found: dict[str, Any] = {}
    for name in SETS:
        mine = [row for row in rows if row["set"] == name]
        if not mine:
            continue
        found[name] = {
            "passages": sorted({row["passages"] for row in mine}),
            "gold": round(float(np.mean([len(row["places"]["bm25"]) for row in mine])), 1),
            "rankers": {ranker: cell for ranker in RANKERS if (cell := figures(mine, ranker))},
        }
    return found


def figures(rows: Sequence[dict[str, Any]], ranker: str) -> dict[str, Any]:
    """Of one ranker, over the questions that it was asked."""
    places = [row["places"] for row in rows if ranker in row["places"]]
    found: dict[str, Any] = {"questions": len(places)} if places else {}
    for base in (None, SHIPPED, "words"):
        both = [one for one in places if base is None or base in one]
        draws = np.random.default_rng(0).integers(len(both), size=(RESAMPLES, len(both))) if both else None
        for k in AT if both and ranker != base else ():
            values = np.array([recall(one[ranker], k) for one in both])
            less = np.array([recall(one[base], k) if base else 0.0 for one in both])
            found[f"R@{k} minus {base}" if base else f"R@{k}"] = interval(values - less, draws)
    return found


def recall(places: Sequence[int], k: int) -> float:
    return sum(place < k for place in places) / min(k, len(places))


def interval(values: np.ndarray, draws: np.ndarray) -> list[float]:
    """Mean, low, high."""
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return [round(float(x), 4) for x in (values.mean(), low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2", help="a name of `agentctx models ls`, or a folder")
    parser.add_argument("--questions", type=int, default=40, help="of each set")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no question after them")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument(
        "--rankers", nargs="*", choices=COSTLY, default=COSTLY, help="beside words and MiniLM"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/retrieval.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = Paths.default()
    embedder = open_embedder("minilm", paths, keep=True, offline=False, progress=announce)
    opened: Any = open_model(args.model, paths=paths, kv_bytes=0, memory_bytes=MEMORY)
    model: Any = replace(opened, embedder=embedder)
    chosen = items(args.data, model.counter, args.sets, args.questions)
    rows = measure(Bench(model), chosen, args.rankers, args.out.with_suffix(".jsonl"), args.minutes)
    result = {
        "environment": {
            "model": model.profile.name,
            "dtype": str(model.chat.weights.engine.body.shape.dtype),
            "calibrated": model.chat.weights.calibration is not None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
        },
        "command": "python benchmarks/retrieval.py DATA",
        "seconds": round(sum(row["seconds"] for row in rows)),
        "sets": summary(rows),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in result["sets"].items():
        for ranker, cells in one["rankers"].items():
            print(f"{name:12}{cells['questions']:>4} {ranker:26}", *(cells[f"R@{k}"] for k in AT))


if __name__ == "__main__":
    main()
