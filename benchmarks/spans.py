"""How often is the right sentence of a text found first? By likelihood, attention, entropy, words.

    python benchmarks/spans.py DATA_DIR --out benchmarks/results/spans.json

- `needles`: facts of two dozen about four people, asked for in other words, in texts of 900 tokens between
  sentences of `squality` stories. Calibrating used facts of the same kinds, other people, and made-up filler.
- `nq`: Natural Questions (`lost_in_the_middle/nq_oracle.jsonl`), the gold passage among five, in a row; right
  is a sentence of it that holds an answer. Questions that served no choice (`finding.py` drew 100 for that).
- `pick` (with `--pick`): development questions of the same set, the gold passage with BM25's two best others,
  and of `hotpotqa` the supporting passages; is the right sentence first in `workflows.pick`, and after adding
  attention to its scores with a weight chosen on the other half of the questions?

Attention: `calibrated` heads, all heads of the middle layers, `no_null` without taking away what an empty
question gets, `focal` by the one row after the beginning of an answer; `auto` as `Reading.score_spans` does.
Intervals are 95 % bootstrap intervals over questions, differences paired. A stopped run goes on where it was:
a line per question stands beside the output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import time
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Document
from agentctx.models.reader import LikelihoodReader
from agentctx.reading.engine import Engine
from agentctx.reading.needles import haystack
from agentctx.reading.reading import Reading
from agentctx.workflows.pick import _prepare

METHODS = ("bm25", "likelihood", "entropy", "middle", "calibrated", "no_null", "focal", "auto")
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # of attention beside the other signals of `pick`
RESAMPLES = 10_000


@dataclass(frozen=True)
class Item:
    """One question, a text, and which of its sentences are right."""

    id: str
    task: str
    question: str
    text: str
    right: frozenset[int]


def needles(data: Path, engine: Engine, texts: int) -> Iterator[Item]:
    stories = sorted((data / "squality/docs").iterdir())[: 2 * texts]
    for number, story in enumerate(stories):
        prose = story.read_text(encoding="utf-8")
        filler = [" ".join(prose[a:b].split()) for a, b in sentences(prose) if 20 <= b - a <= 300]
        draw = random.Random(f"spans {number}")
        hay = haystack(draw, 900, engine.count, half=number % 2, filler=filler)
        cut = sentences(hay.text)
        for needle in draw.sample(hay.needles, 6):
            right = frozenset(i for i, (a, b) in enumerate(cut) if a <= needle.start < b)
            yield Item(f"{number} {needle.question}", "needles", needle.question, hay.text, right)


def questions(data: Path, count: int, others: int, *, development: bool) -> Iterator[Item]:
    rows = [json.loads(line) for line in (data / "lost_in_the_middle/nq_oracle.jsonl").open()]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)  # the first 100 are `finding.py`'s development questions
    passages = list(dict.fromkeys(row["context"] for row in rows))
    words = Lexical(passages) if development else None
    chosen = order[:100] if development else order[100:]
    for row in [rows[index] for index in chosen][:count]:
        drawn = random.Random(row["id"])
        apart = [text for text in passages if text != row["context"]]
        if words is not None:
            best = [passages[index] for index in words.top(row["question"], others + 1)]
            shown = [text for text in best if text != row["context"]][:others]
        else:
            shown = drawn.sample(apart, others)
        found = [row["context"], *shown]
        drawn.shuffle(found)
        text = "\n\n".join(found)
        start = text.index(row["context"])
        right = frozenset(
            number
            for number, (a, b) in enumerate(sentences(text))
            if start <= a < start + len(row["context"])
            and any(plain(answer) in plain(text[a:b]) for answer in row["answers"])
        )
        if right:
            yield Item(row["id"], "pick_nq" if development else "nq", row["question"] + "?", text, right)


def hotpot(data: Path, count: int) -> Iterator[Item]:
    for line in (data / "hotpotqa/distractor100.jsonl").open().readlines()[:count]:
        row = json.loads(line)
        named = set(row["supporting"]["title"])
        found = [text for text in row["context"].split("\n\n") if text.partition("\n")[0] in named]
        text = "\n\n".join(found)
        cut = sentences(text)
        right = frozenset(
            number
            for number, (a, b) in enumerate(cut)
            if any(plain(answer) in plain(text[a:b]) for answer in row["answers"]) and text[a:b] not in named
        )
        if right and len(cut) - len(right) > 2:
            yield Item(row["id"], "pick_hotpot", row["question"], text, right)


def plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def orders(engine: Engine, reading: Reading, item: Item) -> dict[str, list[int]]:
    """The sentences of the text by each method, best first."""
    cut = sentences(item.text)
    index = {pair: number for number, pair in enumerate(cut)}
    words = Lexical([item.text[a:b] for a, b in cut])
    known = engine.weights.calibration
    found = {"bm25": list(words.top(item.question, len(cut)))}
    ways: dict[str, dict[str, Any]] = {
        "likelihood": {"method": "likelihood"},
        "entropy": {"method": "entropy"},
        "calibrated": {"method": "attention"},
        "middle": {"method": "attention"},
        "no_null": {"method": "attention", "calibrate": False},
        "focal": {"method": "focal"},
        "auto": {"method": "auto"},
    }
    for name, options in ways.items():
        engine.weights.calibration = None if name == "middle" else known
        scored = reading.score_spans(item.question, **options)
        found[name] = [index[one.span.start, one.span.end] for one in scored]
    engine.weights.calibration = known
    return found


def signals(engine: Engine, item: Item) -> dict[str, list[Any]]:
    """Per candidate of `pick`: its score without a short answer, attention's, and whether it is right."""
    reader: LikelihoodReader = engine.reader
    passages = item.text.split("\n\n")
    candidates, base = _prepare(item.question, passages)
    seen = reader.scores(item.question, [one.read for one in candidates]).values
    looked = asyncio.run(reader.score_spans(item.question, passages)).values
    starts = np.cumsum([0, *[len(text) + 2 for text in passages]])
    cut = {pair: number for number, pair in enumerate(sentences(item.text))}
    within = [np.array(scores) for scores in looked]
    scaled = [(row - row.mean()) / (row.std() + 1e-9) for row in within]  # comparable within a passage only
    places = [cut.get((starts[c.passage] + c.start, starts[c.passage] + c.end)) for c in candidates]
    return {
        "pick": [score + value for score, value in zip(base, seen, strict=True)],
        "attention": [float(scaled[c.passage][c.ordinal]) for c in candidates],
        "right": [place in item.right for place in places],
    }


def measure(engine: Engine, items: Sequence[Item], log: Path) -> list[dict[str, Any]]:
    """A row for each item: the place of the best right sentence by each method, from 0; or signals."""
    done = [json.loads(line) for line in log.open()] if log.exists() else []
    known = {(row["task"], row["id"]) for row in done}
    with log.open("a") as out:
        for item in items:
            if (item.task, item.id) in known:
                continue
            row: dict[str, Any] = {"task": item.task, "id": item.id}
            if item.task.startswith("pick"):
                row |= signals(engine, item)
            else:
                with engine.read(Document.of(item.text), keep=False) as reading:
                    order = orders(engine, reading, item)
                row["sentences"] = len(order["bm25"])
                row["places"] = {
                    name: min(place for place, i in enumerate(found) if i in item.right)
                    for name, found in order.items()
                }
            print(json.dumps(row), file=out, flush=True)
            done.append(row)
    return done


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for task in ("needles", "nq"):
        mine = [row for row in rows if row["task"] == task]
        draws = np.random.default_rng(0).integers(len(mine), size=(RESAMPLES, len(mine))) if mine else None
        for k in (1, 5) if mine else ():
            hits = {m: np.array([row["places"][m] < k for row in mine], float) for m in METHODS}
            for method in METHODS:
                cell = {"task": task, "questions": len(mine), "measure": f"R@{k}", "method": method}
                cell |= interval("value", hits[method], draws)
                cells.append(cell | interval("minus_bm25", hits[method] - hits["bm25"], draws))
    return cells


def fused(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`pick` with attention against without: each question by the weight that suits the other half best."""
    cells: list[dict[str, Any]] = []
    for task in ("pick_nq", "pick_hotpot"):
        mine = [row for row in rows if row["task"] == task and any(row["right"])]
        if not mine:
            continue
        table = np.array([[first_is_right(row, weight) for weight in WEIGHTS] for row in mine], float)
        halves = np.arange(len(mine)) % 2
        chosen = [int(table[halves != half].mean(0).argmax()) for half in (0, 1)]
        gained = np.array([row[chosen[half]] for row, half in zip(table, halves, strict=True)])
        draws = np.random.default_rng(0).integers(len(mine), size=(RESAMPLES, len(mine)))
        cells.append(
            {"task": task, "questions": len(mine), "measure": "R@1"}
            | {"by_weight": dict(zip(map(str, WEIGHTS), table.mean(0).round(4).tolist(), strict=True))}
            | {"weights_chosen": [WEIGHTS[index] for index in chosen]}
            | interval("pick", table[:, 0], draws)
            | interval("with_attention_minus_pick", gained - table[:, 0], draws)
        )
    return cells


def first_is_right(row: dict[str, Any], weight: float) -> bool:
    scores = [a + weight * b for a, b in zip(row["pick"], row["attention"], strict=True)]
    return bool(row["right"][int(np.argmax(scores))])


def interval(name: str, values: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return {name: round(float(values.mean()), 4), f"{name}_95": [round(float(low), 4), round(float(high), 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--needles", type=int, default=3, help="texts of each half, 6 questions each")
    parser.add_argument("--nq", type=int, default=40)
    parser.add_argument("--pick", type=int, default=0, help="questions of each set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # that the middle layers are not calibrated
    started = time.perf_counter()
    engine = Engine.load(args.model, kv_bytes=0)
    items = [
        *needles(args.data, engine, args.needles),
        *questions(args.data, args.nq, 4, development=False),
        *(questions(args.data, args.pick, 2, development=True) if args.pick else ()),
        *hotpot(args.data, args.pick),
    ]
    rows = measure(engine, items, args.out.with_suffix(".jsonl"))
    known = engine.weights.calibration
    result = {
        "environment": {
            "model": engine.weights.name,
            "dtype": str(engine.runtime.body.shape.dtype),
            "heads": known.heads if known else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
        },
        "seconds_of_this_run": round(time.perf_counter() - started, 1),
        "results": summarise(rows),
        "pick": fused(rows),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for cell in result["results"]:
        print(*(cell[key] for key in ("task", "questions", "measure", "method", "value", "value_95")))
    print(json.dumps(result["pick"]))


if __name__ == "__main__":
    main()
