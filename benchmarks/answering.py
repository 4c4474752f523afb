"""Does the answer, or the verbatim span shown with it, hold what was asked for? At what cost?

    python benchmarks/answering.py DATA_DIR --out benchmarks/results/answering.json

Sets: Natural Questions with the gold passage among 20 (`lost_in_the_middle`; the others are other questions'
passages, drawn by seed), `hotpotqa` in the distractor setting, `ruler` at 4k tokens. Ways, all with the same
embedded model:

- `ask`: `Context.ask` with strategy `auto`; correct if the text or a shown supported quote holds the gold.
- `ask_words_only`: the same with the strategy `lexical`: no passage is scored by the model.
- `ask_text`: of `ask`, the generated sentence alone.
- `closed_book`: the question without any text.
- `stuffed`: the whole text in one call.
- `bm25_top`: the passage that BM25 puts first, read in one call.

Each call of the last three uses the prompt of `ask`'s short answer. Also checked for every run: calls and
tokens within the plan, and every citation shown as supported is verbatim. Items finished are kept beside
`--out`, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import string
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentctx.api import Context
from agentctx.memory.errors import ModelError
from agentctx.memory.lexical import Lexical
from agentctx.memory.types import Answer, Document
from agentctx.models.load import Model, open_model
from agentctx.paths import Paths
from agentctx.workflows.short_answer import MAX_TOKENS, clean_short_answer, short_answer_messages

WAYS = ("ask", "ask_words_only", "ask_text", "closed_book", "stuffed", "bm25_top")
BASELINES = ("closed_book", "stuffed", "bm25_top")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Item:
    """One question over a few documents. `every`: all answers must be found; else one of them."""

    id: str
    set: str
    question: str
    answers: list[str]
    documents: list[Document]
    every: bool


def items(data: Path, nq: int, hotpot: int, ruler: int) -> Iterator[Item]:
    """So many items of each set, evenly spread over its file."""
    rng = random.Random(20)
    rows = [json.loads(line) for line in (data / "lost_in_the_middle/nq_oracle.jsonl").open()]
    for row in rows[:: len(rows) // nq][:nq]:
        others = rng.sample([other["context"] for other in rows if other is not row], 19)
        passages = [*others, row["context"]]
        rng.shuffle(passages)
        documents = [
            Document.of(text, f"passage {n}: {text.splitlines()[0]}") for n, text in enumerate(passages)
        ]
        yield Item(row["id"], "nq_20", row["question"], row["answers"], documents, False)
    for line in spread(data / "hotpotqa/distractor100.jsonl", hotpot):
        row = json.loads(line)
        yield Item(
            row["id"], "hotpotqa", row["question"], row["answers"], [Document.of(row["context"])], False
        )
    for line in spread(data / "ruler/ruler_4096.jsonl", ruler):  # four of each task, in order
        row = json.loads(line)
        text, _, question = row["context"].rpartition("\n")
        every = not row["task"].startswith("qa")
        question = question.removeprefix("Question: ")
        yield Item(row["id"], "ruler_4k", question, row["answers"], [Document.of(text)], every)


def spread(file: Path, count: int) -> list[str]:
    lines = file.read_text().splitlines()
    return lines[:: len(lines) // count][:count]


def normalised(text: str) -> str:
    """SQuAD's normalisation."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.casefold())
    return " ".join("".join(c for c in text if c not in string.punctuation).split())


def score(item: Item, text: str) -> float:
    """1 if a gold answer stands in the text; where all are asked for, the share that does."""
    found = [normalised(answer) in normalised(text) for answer in item.answers]
    return sum(found) / len(found) if item.every else float(any(found))


def ask(item: Item, model: Model, strategy: Any) -> dict[str, Any]:
    """One run of the product, with its checks."""
    context = Context.open(item.documents, model=model, ephemeral=True)
    start = time.perf_counter()
    answer = context.ask(item.question, strategy=strategy)
    seconds = time.perf_counter() - start
    quotes = [c for c in answer.citations if c.verdict == "supported"]
    text_of = {document.id: document.text for document in item.documents}
    verbatim = [text_of[c.span.document_id][c.span.start : c.span.end] == c.quote for c in quotes if c.span]
    shown = "\n".join([answer.text, *(citation.quote for citation in quotes)])
    return {
        "score": score(item, shown),
        "text_score": score(item, worded(answer)),
        "worded": bool(worded(answer)),
        "shown_words": len(shown.split()),
        "citations": len(quotes),
        "verbatim": sum(verbatim),
        "unsupported": len(answer.citations) - len(quotes),
        "seconds": seconds,
        "usage": asdict(answer.usage),
        "ceiling": asdict(answer.plan.ceiling),
        "within": within(answer),
    }


def worded(answer: Answer) -> str:
    """What the model generated, without the verbatim span before it."""
    return answer.text.partition("\n\n")[2]


def within(answer: Answer) -> bool:
    usage, ceiling = answer.usage, answer.plan.ceiling
    return (
        usage.calls <= ceiling.calls
        and usage.input_tokens <= ceiling.input_tokens
        and usage.output_tokens <= ceiling.output_tokens
    )


def baseline(item: Item, model: Model, way: str) -> dict[str, Any]:
    """One plain call."""
    texts = [document.text for document in item.documents]
    if way == "closed_book":
        text = ""
    elif way == "stuffed":
        text = "\n\n".join(texts)
    else:
        passages = texts if len(texts) > 1 else cut(texts[0])
        text = passages[Lexical(passages).top(item.question, 1)[0]]
    start = time.perf_counter()
    try:
        messages = short_answer_messages(item.question, text, fence="text-58304417")
        reply = model.chat.invoke(messages, max_tokens=MAX_TOKENS)
    except ModelError as error:
        return {"score": 0.0, "error": error.code, "seconds": 0.0, "input_tokens": 0}
    used = reply.usage_metadata or {"input_tokens": 0}
    return {
        "score": score(item, clean_short_answer(str(reply.text))),
        "seconds": time.perf_counter() - start,
        "input_tokens": used["input_tokens"],
    }


def cut(text: str) -> list[str]:
    """Paragraph-aligned pieces of about 120 words, the passages of the BM25 baseline."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        if pieces and len(pieces[-1].split()) + len(sentence.split()) <= 120:
            pieces[-1] += " " + sentence
        else:
            pieces.append(sentence)
    return [piece for piece in pieces if piece.strip()]


def measure(item: Item, model: Model) -> dict[str, Any]:
    """All ways on one item, one after the other, so that noise falls on all alike."""
    whole = ask(item, model, "auto")
    row: dict[str, Any] = {"id": item.id, "set": item.set, "ask": whole}
    row["ask_text"] = {"score": whole["text_score"]}
    row["ask_words_only"] = ask(item, model, "lexical")
    for way in BASELINES:
        row[way] = baseline(item, model, way)
    return row


def interval(values: list[float]) -> list[float]:
    """Mean and its 95 % bootstrap interval."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES // 10))
    low, high = means[int(0.025 * len(means))], means[int(0.975 * len(means)) - 1]
    return [round(x, 3) for x in (statistics.fmean(values), low, high)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by set and way, paired differences, and what the runs cost."""
    sets: dict[str, Any] = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        asks = [row["ask"] for row in mine]
        sets[name] = {
            "n": len(mine),
            "score": {way: interval([row[way]["score"] for row in mine]) for way in WAYS},
            "ask_minus": {
                way: interval([row["ask"]["score"] - row[way]["score"] for row in mine])
                for way in ("ask_words_only", *BASELINES)
            },
            "worded": statistics.fmean(a["worded"] for a in asks),
            "right_when_worded": statistics.fmean([a["text_score"] for a in asks if a["worded"]] or [0.0]),
            "shown_words_median": statistics.median(a["shown_words"] for a in asks),
            "seconds_median": {
                way: round(statistics.median(row[way]["seconds"] for row in mine), 2)
                for way in ("ask", "ask_words_only", *BASELINES)
            },
            "input_tokens_median": statistics.median(a["usage"]["input_tokens"] for a in asks),
            "ceiling_input_tokens_median": statistics.median(a["ceiling"]["input_tokens"] for a in asks),
        }
    asks = [row[way] for row in rows for way in ("ask", "ask_words_only")]
    citations = sum(a["citations"] for a in asks)
    return {
        "sets": sets,
        "runs": len(asks),
        "runs_within_plan": sum(a["within"] for a in asks),
        "citations_shown": citations,
        "citation_precision": sum(a["verbatim"] for a in asks) / citations,
        "citations_not_supported": sum(a["unsupported"] for a in asks),
        "largest_share_of_plan": {
            name: round(max(a["usage"][name] / a["ceiling"][name] for a in asks), 3)
            for name in ("calls", "input_tokens", "output_tokens")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--nq", type=int, default=120, help="how many of the 600 questions")
    parser.add_argument("--hotpot", type=int, default=40, help="how many of the 40 questions")
    parser.add_argument("--ruler", type=int, default=48, help="how many of the 48 items")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/answering.json"))
    options = parser.parse_args()
    part = options.out.with_suffix(".part")
    rows = [json.loads(line) for line in part.open()] if part.exists() else []
    done = {row["id"] for row in rows}
    model = open_model(options.model, paths=Paths.default())
    with part.open("a") as file:
        for item in items(options.data, options.nq, options.hotpot, options.ruler):
            if item.id not in done:
                rows.append(measure(item, model))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    result = {
        "command": f"python benchmarks/answering.py DATA_DIR --nq {options.nq} --hotpot {options.hotpot} "
        f"--ruler {options.ruler}",
        "model": model.profile.name,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "langgraph", "langchain-core")
        },
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        **summary(rows),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    part.unlink()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
