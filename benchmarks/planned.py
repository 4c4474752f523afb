"""Calls planned and calls made, over texts of the sizes at which another planner's announcement failed.

    python benchmarks/planned.py --out benchmarks/results/planned.json

The released code of lambda-RLM, driven by a scripted client, announces 20 leaves for a question over 131,072
characters and makes 580 calls, and 580 again over 512,000. Here `map_reduce` searches texts of the same sizes
in 20 reads or so, with a scripted model that finds the fact and with one whose answers are never grounded,
which takes the most calls. No model runs, so every machine gets the same figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.messages import BaseMessage

from agentctx.api import Context
from agentctx.memory.types import Document
from agentctx.testing import Reply, ScriptedChat, WordCounter, finding, scripted_model
from agentctx.workflows.cost import without_retries
from agentctx.workflows.strategies.map_reduce import MapReduce

OTHER = {"name": "lambda-RLM, released code", "leaves_announced": 20, "calls_made": 580}
SIZES = (131_072, 512_000)  # characters
LEAVES = 20
WINDOW = 12_000  # tokens; the smaller text has more than twice as many
QUESTION = "What is the code of Zed?"
WORDS = ("river", "boat", "lamp", "stone", "winter", "letter", "harbour", "captain", "morning", "paper")


def text_of(characters: int) -> str:
    """Sentences of seeded words, one of them the fact, of exactly that size."""
    rng = random.Random(0)
    parts = []
    size = 0
    while size < characters:
        parts.append(" ".join(rng.choices(WORDS, k=rng.randint(5, 18))).capitalize() + ". ")
        size += len(parts[-1])
    parts[len(parts) * 2 // 3] = "The code of Zed is K77. "
    return "".join(parts)[:characters].ljust(characters, ".")


def never_grounded(messages: Sequence[BaseMessage]) -> str | dict[str, Any]:
    """Notes a sentence of every read, and never answers."""
    if '"facts"' not in str(messages[0].text):
        return {"text": "", "claims": [], "no_information": True}
    sentence = str(messages[-1].text).split(". ")[2] + "."
    return {"facts": [{"text": sentence, "quotes": [sentence]}], "confidence": 3}


def measure(characters: int, reply: Reply) -> dict[str, int]:
    text = text_of(characters)
    chat = ScriptedChat(reply=reply)
    ctx = Context.open(
        [Document.of(text, "text.txt")], model=scripted_model(chat, context=WINDOW), ephemeral=True
    )
    strategy = MapReduce(chunk_tokens=math.ceil(WordCounter().count_text(text) / LEAVES * 1.1))
    plan = ctx.plan(QUESTION, strategy=strategy)
    assert not chat.prompts, "a plan calls no model"
    answer = ctx.ask(QUESTION, strategy=strategy)
    return {
        "reads_planned": plan.params["reads"],
        "calls_planned": without_retries(plan).calls,
        "calls_at_most": plan.ceiling.calls,
        "calls_made": answer.usage.calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = []
    for characters in SIZES:
        for name, reply in (
            ("finds the fact", finding(r"The code of (\w+ is \w+)\.")),
            ("never", never_grounded),
        ):
            results.append({"characters": characters, "model": name, **measure(characters, reply)})
    text = json.dumps({"other": OTHER, "results": results}, indent=1) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
