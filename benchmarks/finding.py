"""How often is the right passage found first? BM25, query likelihood and their fusions.

    python benchmarks/finding.py DATA_DIR --out benchmarks/results/finding.json

Four tasks: the questions of Natural Questions (`lost_in_the_middle/nq_oracle.jsonl`) with the gold passage
among 20 and among all; forty paraphrased questions (`benchmarks/data/paraphrases.jsonl`) with the gold
passage among the 20 of their collection and among all of it. The form and the constants of
`agentctx.workflows.rank` were chosen on the 100 development questions and on nothing else, so the other 500
are reported apart. Intervals are 95 % bootstrap intervals over questions, paired where methods are compared.

A stopped run goes on where it was: ranks per question stand in a JSON Lines file beside the output. Needs the
dependency group `bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from semantic_text_splitter import TextSplitter

from agentctx.memory.lexical import Lexical
from agentctx.models.load import open_model
from agentctx.models.reader import LikelihoodReader
from agentctx.paths import Paths
from agentctx.workflows.rank import CANDIDATES, LEXICAL_WEIGHT, FirstStage, Ranking, rank

HERE = Path(__file__).resolve().parent
METHODS = ("bm25", "first_stage", "likelihood", "rank_fusion", "fused")
TASKS = ("nq_20", "nq_all", "paraphrase_20", "paraphrase_all")
DEVELOPMENT = 100  # questions, drawn with seed 0
PASSAGE = 800  # characters of a passage cut from a document, at most
RESAMPLES = 10_000


@dataclass(frozen=True)
class Item:
    """One question, the passages to choose from, and which of them are right."""

    id: str
    task: str
    split: str
    question: str
    texts: tuple[str, ...]
    gold: frozenset[int]


def natural_questions(folder: Path) -> Iterator[Item]:
    """The questions whose gold passage is hidden among 19 others, and among all."""
    rows = [json.loads(line) for line in (folder / "lost_in_the_middle/nq_oracle.jsonl").open()]
    passages = tuple(dict.fromkeys(row["context"] for row in rows))
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    development = set(order[:DEVELOPMENT])
    for number, row in enumerate(rows):
        split = "development" if number in development else "test"
        drawn = random.Random(row["id"])
        others = drawn.sample([text for text in passages if text != row["context"]], 19)
        few = [row["context"], *others]
        drawn.shuffle(few)
        for task, texts in (("nq_20", tuple(few)), ("nq_all", passages)):
            gold = frozenset({texts.index(row["context"])})
            yield Item(row["id"], task, split, row["question"], texts, gold)


def paraphrases(folder: Path) -> Iterator[Item]:
    """Questions that share few words with the passage that answers; equal quotes are equally right."""
    rows = [json.loads(line) for line in (HERE / "data/paraphrases.jsonl").open()]
    roots = {"examples": HERE.parent / "examples", "debian_docs": folder / "debian_docs"}
    for name, root in roots.items():
        ours = [row for row in rows if row["source"].startswith(f"{name}/")]
        passages = tuple(_passages(root))
        gold = {row["id"]: _holding(row["gold"], passages) for row in ours}
        right = (passages[min(gold[row["id"]])] for row in ours)
        few = tuple(dict.fromkeys([*right, *passages]))[:20]  # two questions may share a passage
        for row in ours:
            yield Item(row["id"], "paraphrase_20", name, row["question"], few, _holding(row["gold"], few))
            yield Item(row["id"], "paraphrase_all", name, row["question"], passages, gold[row["id"]])


def _passages(root: Path) -> Iterator[str]:
    """The distinct passages of all documents under a folder; equal documents count once."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = dict.fromkeys(
        path.read_text(encoding="utf-8")
        for path in files
        if path.name not in ("README.md", "questions.jsonl")
    )
    splitter = TextSplitter(PASSAGE)
    yield from dict.fromkeys(chunk for text in texts for chunk in splitter.chunks(text))


def _holding(quote: str, passages: Sequence[str]) -> frozenset[int]:
    """Positions of the passages that hold a quote, white space aside."""
    wanted = " ".join(quote.split())
    found = frozenset(i for i, text in enumerate(passages) if wanted in " ".join(text.split()))
    if not found:
        raise SystemExit(f"no passage holds {wanted!r}: the data changed")
    return found


def orders(item: Item, words: Lexical, ranking: Ranking, first: FirstStage) -> dict[str, Sequence[int]]:
    """The order of the passages by each method, all from the same scores."""
    everything = range(len(item.texts))
    lexical = first.scores(item.question)
    by_first = sorted(everything, key=lambda i: -lexical[i])
    likelihood = dict(zip(ranking.scored, ranking.likelihoods, strict=True))
    by_likelihood = sorted(by_first, key=lambda i: -likelihood.get(i, float("-inf")))
    places = [{i: place for place, i in enumerate(order)} for order in (by_first, by_likelihood)]
    return {
        "bm25": words.top(item.question, len(item.texts)),
        "first_stage": by_first,
        "likelihood": by_likelihood,
        "rank_fusion": sorted(by_first, key=lambda i: -sum(1 / (60 + place[i]) for place in places)),
        "fused": ranking.order,
    }


async def measure(items: Sequence[Item], reader: LikelihoodReader, candidates: int, log: Path) -> None:
    """Append one line per item to `log`: the place of the best gold passage by each method, from 0."""
    done = {(row["task"], row["id"]) for row in _read(log)}
    indexes: dict[tuple[str, ...], tuple[Lexical, FirstStage]] = {}
    with log.open("a") as out:
        for number, item in enumerate(items):
            if (item.task, item.id) in done:
                continue
            if item.texts not in indexes:
                indexes = {texts: held for texts, held in indexes.items() if len(texts) > 20}
                indexes[item.texts] = Lexical(item.texts), FirstStage(item.texts)
            words, first = indexes[item.texts]
            started = time.perf_counter()
            ranking = await rank(item.question, item.texts, reader=reader, candidates=candidates, first=first)
            row = {
                "task": item.task,
                "split": item.split,
                "id": item.id,
                "seconds": round(time.perf_counter() - started, 3),
                "computed_tokens": ranking.computed_tokens,
                "reused_tokens": ranking.reused_tokens,
                "places": {
                    method: min(place for place, i in enumerate(order) if i in item.gold)
                    for method, order in orders(item, words, ranking, first).items()
                },
            }
            print(json.dumps(row), file=out, flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(items)}", flush=True)


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.open()] if log.exists() else []


def summarise(rows: Sequence[dict[str, Any]], candidates: int) -> list[dict[str, Any]]:
    """R@1, R@5 and R@candidates per task, split and method, each with its difference from BM25.

    R@candidates of the first stage is the ceiling of everything that comes after it.
    """
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        for split in [*dict.fromkeys(row["split"] for row in mine), "all"]:
            chosen = [row for row in mine if split in (row["split"], "all")]
            draws = np.random.default_rng(0).integers(len(chosen), size=(RESAMPLES, len(chosen)))
            for k in (1, 5, candidates):
                hits = {m: np.array([row["places"][m] < k for row in chosen], float) for m in METHODS}
                for method in METHODS:
                    cells.append(
                        {
                            "task": task,
                            "split": split,
                            "questions": len(chosen),
                            "measure": f"R@{k}",
                            "method": method,
                            **_interval("value", hits[method], draws),
                            **_interval("minus_bm25", hits[method] - hits["bm25"], draws),
                        }
                    )
    return cells


def _interval(name: str, values: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: round(float(values.mean()), 4), f"{name}_95": [round(float(low), 4), round(float(high), 4)]}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as text, one line per task, split and measure."""
    lines = [f"{'task':15}{'split':13}{'n':>4} {'':5}" + "".join(f"{m:>20}" for m in METHODS)]
    for start in range(0, len(cells), len(METHODS)):
        row = cells[start : start + len(METHODS)]
        head = row[0]
        values = (f"{c['value']:.3f} [{c['value_95'][0]:.2f} {c['value_95'][1]:.2f}]" for c in row)
        lines.append(
            f"{head['task']:15}{head['split']:13}{head['questions']:>4} {head['measure']:5}"
            + "".join(f"{value:>20}" for value in values)
        )
    return "\n".join(lines)


def load(name: str) -> LikelihoodReader:
    """The model's reader; what it keeps stays in memory, so that a run depends on no earlier one."""
    chat: Any = open_model(name, paths=Paths.default(), kv_bytes=0).chat
    return LikelihoodReader(chat.weights.engine, chat.weights.tokenizer)


def environment(model: str, candidates: int) -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import transformers

    return {
        "model": Path(model).name,
        "candidates": candidates,
        "lexical_weight": LEXICAL_WEIGHT,
        "passage_characters": PASSAGE,
        "development_questions": DEVELOPMENT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with lost_in_the_middle/ and debian_docs/")
    parser.add_argument("--model", default="smollm2", help="a name of `agentctx models ls`, or a folder")
    parser.add_argument("--out", type=Path, default=HERE / "results/finding.json")
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="measure only these now")
    parser.add_argument("--note", default="", help="recorded, for instance what else the machine was doing")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    items = [*paraphrases(options.data), *natural_questions(options.data)]
    items = [item for item in items if item.task in options.tasks]
    log = options.out.with_suffix(".partial.jsonl")
    started = time.perf_counter()
    asyncio.run(measure(items, load(options.model), options.candidates, log))
    rows = sorted(_read(log), key=lambda row: TASKS.index(row["task"]))
    cells = summarise(rows, options.candidates)
    report = {
        "environment": environment(options.model, options.candidates) | {"note": options.note},
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "seconds_of_this_run": round(time.perf_counter() - started, 1),
        "computed_tokens": sum(row["computed_tokens"] for row in rows),
        "reused_tokens": sum(row["reused_tokens"] for row in rows),
        "results": cells,
        "methods": METHODS,
        "places": {  # of the best right passage, from 0, in the order of `methods`
            task: {
                row["id"]: " ".join(str(row["places"][method]) for method in METHODS)
                for row in rows
                if row["task"] == task
            }
            for task in TASKS
        },
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
