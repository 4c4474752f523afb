"""Write the README's tables of figures from the JSON files under `benchmarks/results/`.

python benchmarks/table.py           writes it
python benchmarks/table.py --check   fails if the README says anything else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKS = {
    "figures": ("<!-- figures: benchmarks/table.py -->\n", "<!-- end of figures -->\n"),
    "attention": ("<!-- attention: benchmarks/table.py -->\n", "<!-- end of attention -->\n"),
    "retrieval": ("<!-- retrieval: benchmarks/table.py -->\n", "<!-- end of retrieval -->\n"),
}
ENOUGH = 8  # questions of a cell of the README; the JSON file has smaller ones
BUDGET = 1024  # tokens, of the methods in the README; the grid has more
AUTO = ROOT / "agentctx/runtime/methods/auto.json"
COMMANDS = {
    "finding": "python benchmarks/finding.py DATA",
    "answering": "python benchmarks/answering.py DATA",
    "startup": "python benchmarks/startup.py DOCUMENT",
    "planned": "python benchmarks/planned.py",
    "corpus": "python benchmarks/corpus.py DATA --documents 500",
    "speed": "agentctx bench speed --lengths 1k..32k --threads 2",
}
SETS = {"nq_20": "NQ, 20 passages", "hotpotqa": "HotpotQA, 10 paragraphs", "ruler_4k": "RULER, 4k tokens"}


FOUND_IN = {
    "nq_20": "NQ, of 20 passages",
    "nq_100": "of 100",
    "nq_1000": "of 1,000",
    "hotpotqa": "HotpotQA, 2 of 10 paragraphs",
    "qmsum": "QMSum, gold turns of a meeting",
    "needles": "facts in 12,000 tokens",
    "examples": "other words, `examples`",
    "debian_docs": "other words, `debian_docs`",
}
RANKERS = {
    "bm25": "BM25",
    "minilm": "MiniLM",
    "words+likelihood": "words+likelihood: `spans`",
    "words+keys+likelihood": "words+keys+likelihood: `kv_retrieval`",
    "words+minilm+likelihood": "words+minilm+likelihood: `spans --embed minilm`",
}


def interval(value: float, low: float, high: float, digits: int = 2) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def found(task: str, measure: str, method: str) -> str:
    """One figure of the finding benchmark, over all questions of the task."""
    rows = [
        row
        for row in load("finding")["results"]
        if (row["task"], row["measure"], row["method"]) == (task, measure, method)
    ]
    row = max(rows, key=lambda row: row["questions"])
    return interval(row["value"], *row["value_95"], digits=3)


def load(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def finding() -> list[str]:
    tasks = {
        "nq_20": "right passage first of 20, 600 NQ questions",
        "nq_all": "right passage first of all 598",
        "paraphrase_20": "right passage first of 20, 40 paraphrased questions",
        "paraphrase_all": "right passage first of the whole collection, the same",
    }
    lines = ["| finding | `agentctx` | likelihood alone | BM25 |", "| --- | --- | --- | --- |"]
    for task, label in tasks.items():
        cells = [found(task, "R@1", method) for method in ("fused", "likelihood", "bm25")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def answering() -> list[str]:
    result = load("answering")
    ways = {"ask": "`ask`, text or shown quote", "ask_words_only": "the same without the model's ranking"}
    ways |= {"ask_text": "`ask`, generated sentence alone", "bm25_top": "BM25's top passage, one call"}
    ways |= {"stuffed": "all in one call", "closed_book": "no text"}
    lines = [
        f"| holds what was asked for | {' | '.join(ways.values())} |",
        "| --- |" + " --- |" * len(ways),
    ]
    for name, data in result["sets"].items():
        cells = [interval(*data["score"][way]) for way in ways]
        lines.append(f"| {SETS[name]}, {data['n']} questions | {' | '.join(cells)} |")
    lines += [
        "",
        f"Quotes shown as supported: {result['citations_shown']}, verbatim in the source: "
        f"{result['citation_precision']:.0%}. Runs within their plan: {result['runs_within_plan']} of "
        f"{result['runs']}; the most of a plan's input tokens that a run used: "
        f"{result['largest_share_of_plan']['input_tokens']:.0%}.",
    ]
    return lines


def startup() -> list[str]:
    result = load("startup")
    ask = result["ask_100_pages"]
    return [
        "| seconds from the start of the process | median |",
        "| --- | --- |",
        f"| `agentctx --help` | {result['help']['median']:.2f} |",
        f"| the embedded model ready, warm | {result['warm_load']['median']:.1f} |",
        f"| of that, importing torch and the tokenizer | {result['imports_of_warm_load']['median']:.1f} |",
        f"| `agentctx ask` over 100 pages ({ask['tokens_of_the_document']:,} tokens), nothing cached | "
        f"{ask['median']:.1f} |",
        "",
        f"Peak memory of that `ask`: {ask['peak_mib_so_far']:,} MiB.",
    ]


def planned() -> list[str]:
    result = load("planned")
    lines = [
        "| calls for a question over | reads planned | calls planned | made, found | made, ungrounded |",
        "| --- | --- | --- | --- | --- |",
    ]
    sizes = sorted({row["characters"] for row in result["results"]})
    for size in sizes:
        found, never = (row for row in result["results"] if row["characters"] == size)
        cells = (found["reads_planned"], found["calls_planned"], found["calls_made"], never["calls_made"])
        lines.append(f"| {size:,} characters | {' | '.join(map(str, cells))} |")
    other = result["other"]
    return [
        *lines,
        "",
        f"{other['name']}, announces {other['leaves_announced']} leaves for either and makes "
        f"{other['calls_made']} calls (scripted clients, both).",
    ]


def corpus() -> list[str]:
    """A question over a directory with and without an index; and what composing loses."""
    result = load("corpus")
    most = max(one["documents"] for one in result["questions"])
    lines = [
        f"| over {most} passages, computed tokens and seconds | first question | second |",
        "| --- | --- | --- |",
    ]
    for one in result["questions"]:
        if one["documents"] == most:
            index = one["index"]
            name = f"`{one['strategy']}`"
            if index:
                name += f", indexed in {index['seconds']:.0f} s at {index['bytes_per_token']:,} bytes a token"
            cells = [f"{asked['computed_tokens']:,}, {asked['seconds']:.1f}" for asked in one["asked"]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    ways = ("contiguous", "composed", "first 16", "changed .15", "random .15")
    lines += [
        "",
        f"| right answers; KL from one piece (questions) | {' | '.join(ways)} |",
        "| --- |" + " --- |" * len(ways),
    ]
    for passages, cell in result["compose"].items():
        found = [
            f"{cell[way]['right'][0]:.2f}; {cell[way]['kl'][0]:.3f} ({cell[way]['n']}, {cell[way]['n_kl']})"
            for way in ways
        ]
        lines.append(f"| {passages} | {' | '.join(found)} |")
    return lines


def speed() -> list[str]:
    """Whole model: ours in milliseconds, the others by how many times as long they take."""
    lines = []
    for path in sorted((ROOT / "benchmarks/results").glob("*-speed-*.json")):
        report = json.loads(path.read_text())
        threads = "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
        said = f"{report['model']}, {report['dtype']}, {threads}"
        cases = report["cases"]
        for operation, unit in (("prefill", "s"), ("decode", "ms a token")):
            own = [case for case in cases if case["operation"] == operation]
            ways = list(dict.fromkeys("/".join(case["options"].values()) for case in own))
            ways.sort(key=lambda way: not way.startswith("dense"))
            heads = " | ".join(f"`{way}`, {unit}" for way in ways)
            lines += [f"| {operation}, {said} | {heads} |", "| --- |" + " --- |" * len(ways)]
            for tokens in sorted({case["shape"]["tokens"] for case in own}):
                found = [[case for case in own if case["shape"]["tokens"] == tokens
                          and "/".join(case["options"].values()) == way] for way in ways]  # fmt: skip
                lines.append(f"| {tokens:,} tokens | {' | '.join(map(timed, found))} |")
            lines.append("")
    return lines[:-1]


def timed(cases: list[Any]) -> str:
    """A time of ours, and how many times as long each peer takes for the same."""
    if not cases:
        return ""
    time = cases[0]["median_us"] / (1e6 if cases[0]["operation"] == "prefill" else 1e3)
    others = ", ".join(f"{case['baseline']} {case['ratio']:.1f}x" for case in sorted(cases, key=_peer))
    return f"{time:.{2 if time < 10 else 1}f} ({others})"


def _peer(case: Any) -> bool:
    return bool(case["baseline"] != "transformers")


def attention() -> str:
    grid = load("grid")
    cells = [cell for cell in grid["cells"] if "score" in cell]
    lengths = sorted({cell["length"] for cell in cells})
    dense = [cell for cell in cells if cell["method"] == "dense"]
    sized = [cell for cell in cells if cell["budget"] == BUDGET]
    ways = dict.fromkeys(cell["attention"] for cell in [*dense, *sized])
    found = {(cell["attention"], cell["length"]): cell for cell in cells}
    heads = " | ".join(f"{length:,} tokens" for length in lengths)
    lines = [
        f"| same next token as dense, rise of the loss, tasks | {heads} |",
        "| --- |" + " --- |" * len(lengths),
    ]
    for way in ways:
        row = [quality(found[way, length]) if (way, length) in found else "" for length in lengths]
        lines.append(f"| `{way}` | {' | '.join(row)} |")
    models = json.loads(AUTO.read_text())
    chosen = "; ".join(f"`{row['attention']}` for {model}" for model, row in models.items())
    texts, tasks = (len(dense[0][name]) for name in ("texts", "tasks"))
    lines += [
        "",
        f"{texts} texts and {tasks} tasks a cell. `auto` is {chosen}. `agentctx bench attention --data DIR`, "
        "`agentctx bench auto GRID`",
    ]
    return "\n".join(lines)


def quality(cell: Any) -> str:
    same = interval(*(cell["agreement"][key] for key in ("mean", "low", "high")), digits=3)
    return f"{same}, {cell['nll_rise']['mean']:+.1%}, {cell['score']['mean']:.2f}"


def retrieval() -> str:
    result = load("retrieval")
    sets = {
        name: one
        for name, one in result["sets"].items()
        if any(cell["questions"] >= ENOUGH for cell in one["rankers"].values())
    }
    asked = (pair for one in sets.values() for pair in one["rankers"].items())
    names = dict.fromkeys(ranker for ranker, cell in asked if cell["questions"] >= ENOUGH)
    heads = [FOUND_IN[name] for name in sets]
    lines = [f"| R@1, R@5, R@20 (questions) | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name in names:
        cells = [recalls(one["rankers"].get(name)) for one in sets.values()]
        lines.append(f"| {RANKERS.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{result['command']}`"])


def recalls(cell: Any) -> str:
    if cell is None or cell["questions"] < ENOUGH:
        return ""
    found = [interval(*cell["R@1"]), *(f"{cell[at][0]:.2f}" for at in ("R@5", "R@20"))]
    return f"{', '.join(found)} ({cell['questions']})"


def figures() -> str:
    parts = []
    tables = {
        "finding": finding,
        "answering": answering,
        "startup": startup,
        "planned": planned,
        "corpus": corpus,
    }
    for name, table in tables.items():
        parts.append("\n".join([*table(), "", f"`{load(name).get('command', COMMANDS[name])}`", ""]))
    parts.append("\n".join([*speed(), "", f"`{COMMANDS['speed']}`", ""]))
    return "\n".join(parts)


def main() -> None:
    written = text = README.read_text(encoding="utf-8")
    blocks = {"figures": figures(), "attention": attention() + "\n", "retrieval": retrieval() + "\n"}
    for name, block in blocks.items():
        start, end = MARKS[name]
        before, rest = written.split(start)
        _, after = rest.split(end)
        written = f"{before}{start}\n{block}\n{end}{after}"
    if "--check" in sys.argv:
        sys.exit(written != text and "README.md is behind benchmarks/results; run python benchmarks/table.py")
    README.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
