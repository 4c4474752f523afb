"""What is left of a small model beyond its window? Needles and real text at 8K, 16K and 32K tokens.

    python benchmarks/beyond.py DATA_DIR --out benchmarks/results/beyond.json

The embedded model was trained for 8,192 tokens. A text is stories of SQuALITY with a needle every 2,048
tokens, a sentence that gives the number of a key (multi-key needles, after RULER, arXiv 2404.06654). Each
method reads it once; at each length it is asked for four of the needles so far, spread over the text, and the
next 256 tokens of the stories are scored. A needle counts as found if its number is in the first tokens of a
greedy answer. `dense` runs with its window lifted, to show what the others are for. Keys, numbers and the
order of the stories are drawn from the number of the text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from agentctx.models.catalog import ensure
from agentctx.models.manifest import Manifest
from agentctx.models.table import SMOLLM2
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.methods.table import method

HERE = Path(__file__).resolve().parent
LENGTHS = (8192 - 512, 16384, 32768)  # the first leaves room for the question within the window
EVERY, SCORED, ASKED, ANSWER = 2048, 256, 4, 12
METHODS = (
    "dense",
    "selfextend",
    "ropescale:kind=yarn,factor=4",
    "ropescale:kind=ntk,factor=4",
    "ropescale:kind=linear,factor=4",
    "streaming",
    "lambda",
    "ladder",
)
INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will "
    "quiz you about the numbers afterwards.\n"
)
# fmt: off
ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy",
    "jolly", "keen", "lucid", "mellow", "noble", "odd", "plain",
)
NOUNS = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor",
    "island", "jacket", "kettle", "ladder", "mirror", "needle",
)
# fmt: on


class Text:
    """Tokens, and where each needle ends: `needles` is (token, key, number)."""

    def __init__(self, number: int, stories: list[str], tokenizer: Any) -> None:
        chance = random.Random(number)
        chance.shuffle(stories := list(stories))
        filler = self._tokens(tokenizer, " ".join(" ".join(stories).split())[: LENGTHS[-1] * 8])
        keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        self.ids, self.needles = self._tokens(tokenizer, INTRODUCTION), []
        for at, key in zip(range(0, len(filler), EVERY), chance.sample(keys, len(keys)), strict=False):
            value = str(chance.randint(1_000_000, 9_999_999))
            needle = f" One of the special magic numbers for {key} is: {value}."
            half = at + EVERY // 2
            self.ids += filler[at:half] + self._tokens(tokenizer, needle)
            self.needles.append((len(self.ids), key, value))
            self.ids += filler[half : at + EVERY]

    @staticmethod
    def _tokens(tokenizer: Any, text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def asked(self, length: int) -> list[tuple[str, str]]:
        """Keys and numbers of needles within the first tokens, from the first to the last."""
        within = [(key, value) for end, key, value in self.needles if end <= length]
        return [within[round(i * (len(within) - 1) / (ASKED - 1))] for i in range(ASKED)]


def answer(context: Context, tokenizer: Any, key: str) -> str:
    """Greedy tokens after a question; the context is left as it was."""
    ask = (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    fork = context.fork()
    hidden = fork.feed(tokenizer(ask, add_special_tokens=False).input_ids)
    ids: list[int] = []
    for _ in range(ANSWER):
        assert hidden is not None
        ids.append(int(context.engine.logits(hidden).argmax()))
        hidden = fork.feed(ids[-1:])
    fork.close()
    return str(tokenizer.decode(ids))


def loss(context: Context, ids: list[int]) -> float:
    """Mean negative log-likelihood of all of `ids` but the first."""
    fork = context.fork()
    hidden = context.engine.step([fork], torch.tensor([ids[:-1]]))[0]
    found = F.cross_entropy(context.engine.logits(hidden), torch.tensor(ids[1:]))
    fork.close()
    return float(found)


def measure(engine: Engine, text: Text, tokenizer: Any, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each length; each reads on where the one before it ended."""
    for length in lengths:
        started = time.perf_counter()
        context = engine.read(text.ids[:length])
        seconds = time.perf_counter() - started
        hits = [value in answer(context, tokenizer, key) for key, value in text.asked(length)]
        nll = loss(context, text.ids[length : length + SCORED + 1])
        yield {"length": length, "found": hits, "nll": round(nll, 4), "seconds": round(seconds, 1)}
        context.close()


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """By method and length: needles found, out of how many, and the mean loss."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(cell["method"] for cell in cells):
        for length in LENGTHS:
            rows = [cell for cell in cells if (cell["method"], cell["length"]) == (name, length)]
            if rows:
                hits = [hit for row in rows for hit in row["found"]]
                nll = round(sum(row["nll"] for row in rows) / len(rows), 3)
                found.setdefault(name, {})[str(length)] = {"found": sum(hits), "of": len(hits), "nll": nll}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with squality/docs/")
    parser.add_argument("--texts", type=int, default=2, help="each gives four needles a length")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--out", type=Path, default=HERE / "results/beyond.json", help="cells in it are kept")
    options = parser.parse_args()
    folder = ensure(SMOLLM2, Paths.default())
    weights = Weights.load(folder, name="smollm2", verify=Manifest.read(folder), linears="bf16")
    body, trained, tokenizer = weights.engine.body, weights.engine.window, weights.tokenizer
    stories = [
        path.read_text(errors="replace") for path in sorted((options.data / "squality/docs").iterdir())
    ]
    cells = json.loads(options.out.read_text())["cells"] if options.out.exists() else []
    for number in range(options.texts):
        text = Text(number, stories, tokenizer)
        for name in options.methods:
            done = {cell["length"] for cell in cells if (cell["method"], cell["text"]) == (name, number)}
            body.window = 2 * LENGTHS[-1] if name == "dense" else trained
            engine = Engine(body, fingerprint="beyond", memory_bytes=1 << 30, method=method(name))
            for row in measure(engine, text, tokenizer, sorted({*options.lengths} - done)):
                cells.append({"method": name, "as": repr(engine.method), "text": number} | row)
                print(json.dumps(cells[-1]), flush=True)
                report = {"environment": environment(trained), "results": summary(cells), "cells": cells}
                options.out.write_text(json.dumps(report, indent=1) + "\n")
            del engine
    print(json.dumps(summary(cells), indent=1))


def environment(trained: int) -> dict[str, Any]:
    return {
        "model": SMOLLM2.gguf.basename,
        "window": trained,
        "needle_every": EVERY,
        "scored_tokens": SCORED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "note": "other work ran on the machine: seconds are no measurement of speed",
    }


if __name__ == "__main__":
    main()
