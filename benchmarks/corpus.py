"""What an index costs and gives: composed against contiguous reading, the second question, the search.

    python benchmarks/corpus.py DATA_DIR --questions 50 --documents 100

On the passages of Natural Questions (`lost_in_the_middle/nq_oracle.jsonl`) with the embedded model. Three
parts, each resumable: what is done stands in a JSON Lines file beside the output, and a later run with larger
numbers goes on from there.

- compose: the right passage among 1, 2, 4 or 8, at a drawn place. Read in one piece; composed of passages
  that were read by themselves; composed with tokens of each computed anew: its first 16, the .15 that change
  most in their new place (`corpus.blend`), and .15 drawn at random, which these must beat. The share of
  answers that hold an accepted one; along the contiguous answer, how often composed KV gives the same
  likeliest token, and how far its distributions are (KL, nats); for the changed ones also the difference
  from the others, question by question. Seconds are until the first token. Intervals are 95 % bootstrap
  intervals over questions.
- questions: an `ask` over a directory without and with an index, two questions each, tokens and seconds.
- search: random unit vectors as blocks; median seconds of a search for the best 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentctx.api import Context
from agentctx.corpus.attach import with_index
from agentctx.corpus.chat import ComposedChat
from agentctx.corpus.index import KEEP, Index
from agentctx.memory.database import Database
from agentctx.memory.documents import open_documents
from agentctx.memory.vectors import SCHEMA, Vectors
from agentctx.models.load import Model, open_model
from agentctx.models.local import LocalChat
from agentctx.paths import Paths
from agentctx.workflows.roles import SHORT_ANSWER

COUNTS = (1, 2, 4, 8)
REPAIR = 16  # tokens
SHARE = 0.15  # of a passage's tokens
CHANGED = "changed .15"
WAYS = ("contiguous", "composed", "first 16", CHANGED, "random .15")
BLOCKS = (1_000, 10_000, 100_000)
WIDTH = 576  # numbers of a vector of the embedded model
ANSWER = 24  # tokens
RESAMPLES = 2_000
ASKED = ("Who was the first?", "When was it built, and where?")


def compose(index: Index, rows: Sequence[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """One line for each question and number of passages."""
    contexts = [row["context"] for row in rows]
    for row in rows[:count]:
        drawn = random.Random(row["id"])
        others = drawn.sample([text for text in contexts if text != row["context"]], max(COUNTS) - 1)
        for passages in COUNTS:
            chosen = [row["context"], *others[: passages - 1]]
            drawn.shuffle(chosen)
            yield {"part": "compose", "id": row["id"], "passages": passages, "chosen": chosen, **row}


def composed(index: Index, item: dict[str, Any]) -> dict[str, Any]:
    """Answers to one item in all ways."""
    messages = SHORT_ANSWER.render(item["question"], [("", text) for text in item["chosen"]], "31415926")
    prompt = index.chat.template.encode(messages)
    with index._holding(list(index.reader.held_as(item["chosen"]).values())) as contexts:
        for context in contexts:
            index.engine.keep(context, KEEP)
    plain = index.composed(item["chosen"])
    assert isinstance(plain, ComposedChat)
    fields = {name: getattr(plain, name) for name in type(plain).model_fields} | {"recompute": 0.0}
    index.engine.prefixes.clear()  # as in another process: KV comes from the disk, for the first way
    chats: tuple[LocalChat, ...] = (
        index.chat,
        ComposedChat(**fields),
        ComposedChat(**fields | {"repair": REPAIR}),
        ComposedChat(**fields | {"recompute": SHARE}),
        Drawn(**fields | {"recompute": SHARE}),
    )
    begun, found = [], {"part": "compose", "id": item["id"], "passages": item["passages"]}
    for name, chat in zip(WAYS, chats, strict=True):
        began = time.perf_counter()
        context, hidden = chat._begin(prompt, threading.Event())
        assert hidden is not None
        found[name] = {"computed": context.computed, "seconds": round(time.perf_counter() - began, 3)}
        begun.append((context, hidden))
    for name, (ids, same, divergence) in zip(WAYS, _answered(index, begun), strict=True):
        text = index.chat.weights.tokenizer.decode(ids).casefold()
        right = any(answer.casefold() in text for answer in item["answers"])
        found[name] |= {"right": right, "same": round(same, 4), "kl": round(divergence, 5)}
    return found


class Drawn(ComposedChat):
    """As many tokens of each passage, drawn."""

    def _far(self, context: Any, start: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.rand(k.shape[2], generator=torch.Generator().manual_seed(start))


def _answered(
    index: Index, begun: Sequence[tuple[Any, torch.Tensor]]
) -> list[tuple[list[int], float, float]]:
    """For each beginning, in one batch: its greedy answer, and along that of the first the share of tokens
    that are likeliest here too and the mean divergence (nats) from what the first gives.
    """
    engine, ends = index.engine, index.chat.weights.ends
    contexts = [context for context, _ in begun]
    forks = [context.fork() for context in contexts]
    states = torch.stack([hidden for _, hidden in begun])
    first, answers = states, []
    for _ in range(ANSWER):
        answers.append(engine.logits(states).argmax(-1))
        states = engine.step(contexts, answers[-1][:, None])[:, -1]
    rows = []
    for row in torch.stack(answers, 1).tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:end])
    if not rows[0]:
        rows[0] = [int(answers[0][0])]
    along = torch.tensor([rows[0]] * len(rows))
    known = [first[:, None]]
    if along.shape[1] > 1:
        known.append(engine.step(forks, along[:, :-1]))
    logs = engine.logits(torch.cat(known, 1)).log_softmax(-1)
    for one in (*contexts, *forks):
        one.close()
    same = (logs.argmax(-1) == along).float().mean(1).tolist()
    apart = (logs[0].exp() * (logs[0] - logs)).sum(-1).mean(1).tolist()
    return list(zip(rows, same, apart, strict=True))


def questions(data: Path, model: Model, paths: Paths, documents: int) -> list[dict[str, Any]]:
    """Two questions over a directory of so many passages: read by `spans`, then from the index."""
    rows = [json.loads(line) for line in (data / "lost_in_the_middle/nq_oracle.jsonl").open()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "passages"
        folder.mkdir()
        for number, row in enumerate(rows[:documents]):
            (folder / f"{number:04d}.txt").write_text(row["context"])
        found = []
        for strategy in ("spans", "kv_retrieval"):
            index: dict[str, Any] = {}
            if strategy == "kv_retrieval":
                made = Index.open(paths.index, model)
                began = time.perf_counter()
                added = made.add(str(folder), open_documents([folder]).documents)
                seconds = time.perf_counter() - began
                kept = made.catalog.passages().values()
                tokens = sum(one.tokens for one in kept)
                index = {
                    "tokens": added.computed_tokens,
                    "seconds": round(seconds, 2),
                    "tokens_per_second": round(added.computed_tokens / seconds, 1),
                    "bytes_per_token": round(made._bytes(kept) / tokens),
                }
            asked = []
            for row in rows[:2]:
                context = Context.open(folder, model=with_index(model, paths), paths=paths)
                answer = context.ask(row["question"], strategy=strategy)
                usage = answer.usage
                asked.append(
                    {
                        "computed_tokens": usage.computed_tokens,
                        "reused_tokens": usage.reused_tokens,
                        "seconds": usage.seconds,
                    }
                )
            line = {"part": "questions", "id": f"{strategy} {documents}", "documents": documents}
            found.append({**line, "strategy": strategy, "index": index, "asked": asked})
    return found


def search(blocks: int) -> dict[str, Any]:
    """How long a search among so many blocks takes, two to an owner."""
    drawn = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        vectors = Vectors(Database(Path(name) / "index.db", SCHEMA, 1), WIDTH)
        for start in range(0, blocks, 10_000):
            rows = drawn.normal(size=(min(10_000, blocks), WIDTH)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            pairs = rows.reshape(-1, 2, WIDTH)
            vectors.put({f"{start + n}": pair for n, pair in enumerate(pairs)})
        vectors.settle()
        query = drawn.normal(size=WIDTH).astype(np.float32)
        vectors.search(query, 16)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            vectors.search(query, 16)
            times.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(name).glob("*.faiss"))
    return {"part": "search", "id": f"{blocks}", "seconds": round(statistics.median(times), 5), "bytes": size}


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and intervals of all that was measured."""
    found: dict[str, Any] = {}
    for passages in COUNTS:
        mine = {
            one["id"]: one for one in lines if one["part"] == "compose" and one["passages"] == passages
        }  # the last of each counts: earlier ones knew fewer ways
        if not mine:
            continue
        cell = {name: _cell([one[name] for one in mine.values() if name in one]) for name in WAYS}
        full = [one for one in mine.values() if CHANGED in one]
        for other in ("composed", "first 16", "random .15"):
            cell[f"{CHANGED} less {other}"] = {
                key: _interval([float(one[CHANGED][key]) - one[other][key] for one in full])
                for key in ("right", "same", "kl")
                if full
            }
        found[f"{passages} passages"] = cell
    return {
        "compose": found,
        "questions": [one for one in lines if one["part"] == "questions"],
        "search": [one for one in lines if one["part"] == "search"],
    }


def _cell(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one way gave: `n` items (divergence and seconds of `n_kl`, earlier ones had none), means with
    intervals, tokens computed, and median seconds.
    """
    if not found:
        return {"n": 0}
    timed = [one["seconds"] for one in found if "seconds" in one]
    means = {key: [float(one[key]) for one in found if key in one] for key in ("right", "same", "kl")}
    return {
        "n": len(found),
        "n_kl": len(means["kl"]),
        **{key: _interval(values) for key, values in means.items() if values},
        "computed": round(statistics.mean(one["computed"] for one in found)),
        "seconds": round(statistics.median(timed), 3) if timed else None,
    }


def _interval(values: Sequence[float]) -> list[float]:
    """Mean, low, high."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [round(float(x), 3) for x in (np.mean(values), low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/corpus.json")
    options = parser.parse_args()
    log = options.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in log.open()] if log.exists() else []
    done = {
        (one["part"], one["id"], one.get("passages"))
        for one in lines
        if one["part"] != "compose" or CHANGED in one
    }

    def keep(line: dict[str, Any]) -> None:
        line["load"] = round(os.getloadavg()[0], 1)  # above the number of cores, seconds say little
        lines.append(line)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for blocks in BLOCKS:
        if ("search", f"{blocks}", None) not in done:
            keep(search(blocks))
    home = Paths.default()
    with tempfile.TemporaryDirectory() as name:
        paths = Paths(*(Path(name) / part for part in ("cache", "data", "state", "config")))
        paths.cache.mkdir()
        paths.models.symlink_to(home.models)
        model = open_model("smollm2", paths=paths)
        if ("questions", f"kv_retrieval {options.documents}", None) not in done:
            for line in questions(options.data, model, paths, options.documents):
                keep(line)
        rows = [json.loads(line) for line in (options.data / "lost_in_the_middle/nq_oracle.jsonl").open()]
        random.Random(0).shuffle(rows)
        index = Index.open(paths.index, model)
        for item in compose(index, rows, options.questions):
            if ("compose", item["id"], item["passages"]) not in done:
                keep(composed(index, item))
    environment = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    result = {"environment": environment, **summary(lines)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
