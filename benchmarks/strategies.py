"""Which strategy answers, at what cost, with one model and one budget?

    python benchmarks/strategies.py DATA_DIR --model MODEL --window 1500 --out FILE

Sets: Natural Questions with the gold passage among 20 (`lost_in_the_middle`) and `hotpotqa` in the distractor
setting, as `benchmarks/answering.py` makes them. Every strategy gets the same items, the same window, and
at most `--share` times the input's tokens; what ends early counts with what it has. `shown`: a gold answer
stands in the text or in a quote that was verified; `text`: in the text alone. `lexical` is the baseline,
`auto` and the closed book stand beside. Every run is held against its plan. Items are interleaved, finished
runs are kept beside `--out`, and nothing new begins after `--minutes`, so n is what there was time for.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answering import Item, baseline, interval, items, normalised, within

from agentctx.api import Context
from agentctx.memory.errors import AgentctxError, BudgetExceeded
from agentctx.memory.types import Answer, Budget
from agentctx.models.load import Model, open_model
from agentctx.paths import Paths

STRATEGIES = ("lexical", "map_reduce", "recursive", "fold", "gist", "search", "agents", "auto")


def measure(item: Item, model: Model, strategy: str, share: float) -> dict[str, Any]:
    """One run, whatever becomes of it."""
    tokens = sum(model.counter.count_text(document.text) for document in item.documents)
    context = Context.open(item.documents, model=model, ephemeral=True)
    start = time.perf_counter()
    error = ""
    try:
        answer: Answer = context.ask(
            item.question, strategy=strategy, budget=Budget(input_tokens=int(tokens * share))
        )
    except BudgetExceeded as ended:
        answer, error = ended.partial, "budget"
    except AgentctxError as failed:
        return {"shown": 0.0, "text": 0.0, "error": failed.code, "seconds": time.perf_counter() - start}
    quotes = [citation.quote for citation in answer.citations if citation.verdict == "supported"]
    return {
        "shown": _score(item, "\n".join([answer.text, *quotes])),
        "text": _score(item, answer.text),
        "error": error,
        "status": answer.status,
        "seconds": round(time.perf_counter() - start, 2),
        "input_tokens_of_n": round(answer.usage.input_tokens / tokens, 3),
        "usage": asdict(answer.usage),
        "ceiling": asdict(answer.plan.ceiling),
        "within": within(answer),
        "supported": len(quotes),
        "unsupported": len(answer.citations) - len(quotes),
    }


def _score(item: Item, text: str) -> float:
    found = [normalised(answer) in normalised(text) for answer in item.answers]
    return sum(found) / len(found) if item.every else float(any(found))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By set and strategy: scores, differences from `lexical` on the same items, cost."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        by: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["set"] == name:
                by.setdefault(row["strategy"], {})[row["id"]] = row
        found[name] = {strategy: _one(mine, by.get("lexical", {})) for strategy, mine in by.items()}
    return found


def _one(mine: dict[str, Any], lexical: dict[str, Any]) -> dict[str, Any]:
    runs = list(mine.values())
    result: dict[str, Any] = {"n": len(runs), "shown": interval([run["shown"] for run in runs])}
    both = [key for key in mine if key in lexical]
    if both:
        result["shown_minus_lexical"] = interval([mine[key]["shown"] - lexical[key]["shown"] for key in both])
    if "text" in runs[0]:
        result["text"] = interval([run["text"] for run in runs])
    counted = [run for run in runs if "usage" in run]
    if counted:
        result |= {
            "calls": statistics.median(run["usage"]["calls"] for run in counted),
            "input_tokens_of_n": statistics.median(run["input_tokens_of_n"] for run in counted),
            "output_tokens": statistics.median(run["usage"]["output_tokens"] for run in counted),
            "seconds": statistics.median(run["seconds"] for run in counted),
            "within_plan": sum(run["within"] for run in counted),
            "ended_by_budget": sum(run["error"] == "budget" for run in counted),
            "quotes_supported": sum(run["supported"] for run in counted),
            "quotes_not_supported": sum(run["unsupported"] for run in counted),
        }
    errors = [run["error"] for run in runs if run.get("error") not in ("", "budget", None)]
    return result | ({"errors": errors} if errors else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--linears", default="auto", choices=("auto", "bf16", "int4"))
    parser.add_argument("--window", type=int, help="tokens of the model's window that are used")
    parser.add_argument("--share", type=float, default=6.0, help="input tokens allowed, of the input's own")
    parser.add_argument("--nq", type=int, default=8)
    parser.add_argument("--hotpot", type=int, default=8)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strategies.json"))
    options = parser.parse_args()
    part = options.out.with_suffix(".part")
    rows = [json.loads(line) for line in part.open()] if part.exists() else []
    done = {(row["id"], row["strategy"]) for row in rows}
    model = open_model(options.model, paths=Paths.default(), window=options.window, linears=options.linears)
    ends = time.monotonic() + options.minutes * 60
    sets = list(items(options.data, options.nq, options.hotpot, 1))
    nq, hotpot = ([item for item in sets if item.set == name] for name in ("nq_20", "hotpotqa"))
    mixed = [item for pair in zip(nq, hotpot, strict=False) for item in pair]
    with part.open("a") as file:
        for item in mixed:
            for strategy in [*options.strategies.split(","), "closed_book"]:
                if (item.id, strategy) in done or time.monotonic() > ends:
                    continue
                if strategy == "closed_book":
                    found = baseline(item, model, "closed_book")
                    row = {"shown": found["score"], "seconds": found["seconds"]}
                else:
                    row = measure(item, model, strategy, options.share)
                rows.append({"id": item.id, "set": item.set, "strategy": strategy, **row})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                print(
                    item.set, strategy, row.get("shown"), row.get("seconds"), row.get("error", ""), flush=True
                )
    result = {
        "command": f"python benchmarks/strategies.py DATA_DIR --model MODEL --window {options.window} "
        f"--share {options.share} --linears {options.linears}",
        "model": model.profile.name,
        "versions": {name: version(name) for name in ("torch", "langgraph", "langchain-core")},
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "sets": summary(rows),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
