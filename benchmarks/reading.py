"""What a small model makes of the passages it is given: which sentence is shown, which answer beside it.

    python benchmarks/reading.py DATA_DIR --model FOLDER --out benchmarks/results/reading.json

Natural Questions (`lost_in_the_middle/nq_oracle.jsonl`), every second question but for the first 60: those
and the other half were used to choose the methods. A *hit* is a gold answer inside the text in question
(SQuAD's normalisation).

- `spans`: is the answer in the sentences that a method shows? Methods: the longest sentences, query
  likelihood of the bare sentence, and `agentctx.workflows.pick` with the Reader and without (`words`), each
  before and after a short answer is known; the whole passage is the upper bound.
- `answers`: the short answer from the picked sentences, from the whole passage and from none, and how often
  what is shown of it is right: the part that the code finds in the shown span.
- `lengths`: all of N tokens read in one call, against reading only the best of the same passages. The
  passages beside the right one are those BM25 takes for it, so they are hard.

Intervals are 95 % bootstrap intervals over questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from langchain_core.messages import convert_to_openai_messages
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.models.reader import LikelihoodReader
from agentctx.models.weights import Weights
from agentctx.workflows.grounding import supported_part
from agentctx.workflows.pick import excerpt, pick, pick_cost
from agentctx.workflows.short_answer import MAX_TOKENS, clean_short_answer, short_answer_messages

LENGTHS = (300, 600, 1000, 1600)  # tokens of passages in one call
FENCE = "text-7f3a"
RESAMPLES = 2000
SPENT = 60  # questions of this half that were looked at before the weights were final
BATCH = 10  # replies written side by side
Table = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One question, what counts as right, the passage that answers, and what a search finds."""

    question: str
    gold: tuple[str, ...]
    passage: str
    found: tuple[str, ...]  # BM25's best passages among all, best first


def load(folder: Path, number: int) -> list[Item]:
    """The first `number` questions that served no choice."""
    rows = [json.loads(line) for line in (folder / "lost_in_the_middle/nq_oracle.jsonl").open()]
    passages = list(dict.fromkeys(row["context"] for row in rows))
    words = Lexical(passages)
    return [
        Item(
            row["question"],
            tuple(row["answers"]),
            row["context"],
            tuple(passages[position] for position in words.top(row["question"], 20)),
        )
        for row in rows[1::2][SPENT:][:number]
    ]


def normal(text: str) -> str:
    """Letters and digits only, one space between words, no articles."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[\W_]+", " ", folded).split()
    return f" {' '.join(word for word in words if word not in ('a', 'an', 'the'))} "


def hit(text: str, gold: Sequence[str]) -> bool:
    return any(normal(answer) in normal(text) for answer in gold)


class Writer:
    """Greedy replies in batches; a prompt seen before is not run again."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._replies: dict[str, str] = {}
        tokenizer.padding_side = "left"

    def answers(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """A short answer per (question, passage), cleaned."""
        prompts = [self._render(question, passage) for question, passage in asked]
        missing = sorted(set(prompts) - self._replies.keys(), key=len)
        for at in range(0, len(missing), BATCH):
            batch = missing[at : at + BATCH]
            inputs = self._tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                output = self._model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            self._replies |= zip(
                batch, self._tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            )
        return [clean_short_answer(self._replies[prompt]) for prompt in prompts]

    def _render(self, question: str, passage: str) -> str:
        if passage:
            messages = convert_to_openai_messages(short_answer_messages(question, passage, fence=FENCE))
        else:
            messages = [{"role": "user", "content": f"Answer in a few words.\nQuestion: {question}?"}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


async def shown(
    item: Item, passages: Sequence[str], reader: LikelihoodReader | None, answer: str, limit: int
) -> str:
    """What a person would see of the passages."""
    picked = await pick(item.question, passages, reader=reader, answer=answer, limit=limit)
    return "\n".join(passages[span.passage][span.start : span.end] for span in picked.picks)


async def bare(item: Item, reader: LikelihoodReader | None, limit: int) -> str:
    """The best sentences of the right passage by bare likelihood, or the longest without a reader."""
    texts = [item.passage[start:end] for start, end in sentences(item.passage)]
    if reader is None:
        scores: Sequence[float] = [len(text) for text in texts]
    else:
        scores = (await reader.likelihood(item.question, texts)).values
    order = sorted(range(len(texts)), key=lambda position: -scores[position])
    return "\n".join(texts[position] for position in order[:limit])


async def spans(items: Sequence[Item], reader: LikelihoodReader, answers: Sequence[str]) -> Table:
    """Hits of each method with one and with two sentences of the right passage."""
    texts: dict[str, list[str]] = {"passage": [item.passage for item in items]}
    for limit in (1, 2):
        texts[f"longest/{limit}"] = [await bare(item, None, limit) for item in items]
        texts[f"likelihood_bare/{limit}"] = [await bare(item, reader, limit) for item in items]
        for name, scorer in (("words", None), ("pick", reader)):
            for suffix, replies in (("", [""] * len(items)), ("+answer", answers)):
                texts[f"{name}{suffix}/{limit}"] = [
                    await shown(item, [item.passage], scorer, reply, limit)
                    for item, reply in zip(items, replies, strict=True)
                ]
    tokens = [pick_cost(item.question, [item.passage], reader=reader) for item in items]
    return {name: scored(items, column) for name, column in texts.items()} | {
        "reader_tokens": {"mean": float(np.mean(tokens)), "most": max(tokens)}
    }


async def picked_text(item: Item, passages: Sequence[str], reader: LikelihoodReader) -> str:
    """What the model reads to answer: the two likeliest sentences under their headings."""
    picked = await pick(item.question, passages, reader=reader, limit=2)
    return excerpt(passages, picked.picks)


async def answered(
    items: Sequence[Item], passages: Sequence[Sequence[str]], read: Sequence[str], *tools: Any
) -> Table:
    """Short answers from what was read; spans picked again with them; right answers by support."""
    reader, writer = tools
    replies = writer.answers([(item.question, text) for item, text in zip(items, read, strict=True)])
    right = [hit(reply, item.gold) for item, reply in zip(items, replies, strict=True)]
    table: Table = {
        "right": interval(right),
        "words": float(np.mean([len(reply.split()) for reply in replies])),
        "read": scored(items, read),
    }
    for limit in (1, 2):
        texts = [
            await shown(item, given, reader, reply, limit)
            for item, given, reply in zip(items, passages, replies, strict=True)
        ]
        parts = [
            supported_part(reply, text, item.question)
            for item, reply, text in zip(items, replies, texts, strict=True)
        ]
        table[f"shown_{limit}"] = {
            "span": scored(items, texts),
            "supported": interval([bool(part) for part in parts]),
            "right_if_supported": interval(
                [hit(part, item.gold) for item, part in zip(items, parts, strict=True) if part]
            ),
            "right_if_not": interval([r for r, part in zip(right, parts, strict=True) if not part]),
        }
    return table


async def answers_table(items: Sequence[Item], reader: LikelihoodReader, writer: Writer) -> Table:
    """The short answer from picked sentences and from whole passages, of the right one and of found ones."""
    gold = [[item.passage] for item in items]
    first = [item.found[:1] for item in items]
    three = [item.found[:3] for item in items]
    closed = writer.answers([(item.question, "") for item in items])
    table: Table = {
        "closed_book": interval([hit(a, item.gold) for item, a in zip(items, closed, strict=True)])
    }
    for name, passages in (("right_passage", gold), ("first_found", first), ("three_found", three)):
        read = [await picked_text(item, given, reader) for item, given in zip(items, passages, strict=True)]
        table[f"{name}/picked"] = await answered(items, passages, read, reader, writer)
        print(name, json.dumps(table[f"{name}/picked"], indent=1), flush=True)
    table["right_passage/whole"] = await answered(items, gold, [texts[0] for texts in gold], reader, writer)
    print(json.dumps(table["right_passage/whole"], indent=1), flush=True)
    return table


async def lengths(
    items: Sequence[Item],
    reader: LikelihoodReader,
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
) -> Table:
    """Right answers when N tokens are read at once, and when only the best of the same passages is read."""
    table: Table = {}
    for length in LENGTHS:
        chosen = [passages_of(item, length, tokenizer) for item in items]
        everything = [(item.question, "\n\n".join(texts)) for item, texts in zip(items, chosen, strict=True)]
        best = [
            (item.question, texts[int(np.argmax((await reader.likelihood(item.question, texts)).values))])
            for item, texts in zip(items, chosen, strict=True)
        ]
        direct, selected = (
            [hit(reply, item.gold) for item, reply in zip(items, writer.answers(asked), strict=True)]
            for asked in (everything, best)
        )
        table[str(length)] = {
            "passages": float(np.mean([len(texts) for texts in chosen])),
            "all": interval(direct),
            "best": interval(selected),
            "all-best": interval([int(d) - int(s) for d, s in zip(direct, selected, strict=True)]),
            "best_is_right_passage": interval(
                [passage == item.passage for item, (_, passage) in zip(items, best, strict=True)]
            ),
        }
        print(length, json.dumps(table[str(length)]), flush=True)
    return table


def passages_of(item: Item, length: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The right passage and the likeliest wrong ones, at most `length` tokens in all, in a drawn order."""
    texts, left = [item.passage], length - len(tokenizer(item.passage).input_ids)
    for other in item.found:
        tokens = len(tokenizer(other).input_ids)
        if other != item.passage and tokens <= left:
            texts.append(other)
            left -= tokens
    random.Random(f"{item.question}/{length}").shuffle(texts)
    return texts


def scored(items: Sequence[Item], texts: Sequence[str]) -> Table:
    hits = [hit(text, item.gold) for item, text in zip(items, texts, strict=True)]
    return {**interval(hits), "words": float(np.mean([len(text.split()) for text in texts]))}


def interval(values: Sequence[float]) -> Table:
    """Mean, number of values and the 95 % bootstrap interval of the mean."""
    if not values:
        return {"mean": None, "n": 0}
    sample = np.asarray(values, dtype=float)
    means = np.random.default_rng(0).choice(sample, (RESAMPLES, len(sample))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(sample.mean()), "low": float(low), "high": float(high), "n": len(sample)}


async def measure(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    weights = Weights.load(args.model, name=args.model.name)
    reader = LikelihoodReader(weights.engine, weights.tokenizer)
    writer = Writer(model, tokenizer)
    items = load(args.data, args.questions)
    begun = time.perf_counter()
    read = [await picked_text(item, [item.passage], reader) for item in items]
    answers = writer.answers([(item.question, text) for item, text in zip(items, read, strict=True)])
    result: Table = {"about": about(args), "spans": await spans(items, reader, answers)}
    save(result, args.out)
    result["answers"] = await answers_table(items, reader, writer)
    save(result, args.out)
    if args.length_questions:
        result["lengths"] = await lengths(items[: args.length_questions], reader, writer, tokenizer)
    result["seconds"] = time.perf_counter() - begun
    save(result, args.out)


def about(args: argparse.Namespace) -> Table:
    return {
        "model": args.model.name,
        "questions": args.questions,
        "length_questions": args.length_questions,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def save(result: Table, path: Path) -> None:
    """Write what is there; a stopped run leaves its finished parts."""
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result[next(reversed(result))]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with lost_in_the_middle/")
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--length-questions", type=int, default=24, help="0 leaves the lengths out")
    args = parser.parse_args()
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()
