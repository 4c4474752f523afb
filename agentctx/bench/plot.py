"""The figures beside the JSON. matplotlib is for those who measure: in the dependency group `bench`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentctx.memory.errors import ConfigError

WIDTH, HEIGHT = 4.2, 3.6  # inches of a panel


def check() -> None:
    """Raise ConfigError where plots cannot be drawn; before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib is not installed, which draws the plots",
            code="missing_extra",
            hint="pip install matplotlib, or pass --no-plot",
        )


def grid(report: dict[str, Any], path: Path) -> None:
    """Agreement by budget, a panel for each length, a line for each method; empty where nothing agrees."""
    found = [cell for cell in report["cells"] if "agreement" in cell and cell["budget"] is not None]
    lengths = sorted({cell["length"] for cell in found})
    figure, panels = _panels(len(lengths))
    for length, axes in zip(lengths, panels, strict=False):
        here = [cell for cell in found if cell["length"] == length]
        for name in sorted({cell["method"] for cell in here}):
            look = {"label": name, "ls": "--" if name == "random" else "-", "marker": "o", "ms": 3}
            rows = sorted((c for c in here if c["method"] == name), key=lambda cell: int(cell["budget"]))
            means = [cell["agreement"]["mean"] for cell in rows]
            below = [max(0.0, cell["agreement"]["mean"] - cell["agreement"]["low"]) for cell in rows]
            above = [max(0.0, cell["agreement"]["high"] - cell["agreement"]["mean"]) for cell in rows]
            axes.errorbar([cell["budget"] for cell in rows], means, [below, above], **look)
        axes.axhline(0.98, color="grey", lw=0.8)
        axes.set(title=f"{length:,} tokens", xlabel="budget, tokens", xscale="log")
        axes.minorticks_off()
        axes.set_xticks(ticks := sorted({cell["budget"] for cell in here}), [f"{tick}" for tick in ticks])
    panels[0].set_ylabel("same next token as dense")
    if found:
        panels[-1].legend(fontsize=7)
    _write(figure, path)


def speed(report: dict[str, Any], path: Path) -> None:
    """Milliseconds by length: prefill and decode, ours and the peers."""
    figure, panels = _panels(2)
    for operation, axes in zip(("prefill", "decode"), panels, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for case in report["cases"]:
            if case["operation"] == operation:
                tokens = case["shape"]["tokens"]
                own = "/".join(case["options"].values())
                lines.setdefault(own, {})[tokens] = case["median_us"] / 1e3
                lines.setdefault(case["baseline"], {})[tokens] = case["baseline_us"] / 1e3
        for name, points in lines.items():
            xs = sorted(points)
            axes.plot(xs, [points[x] for x in xs], label=name, marker="o", ms=3)
        axes.set(title=operation, xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
        ticks = sorted({x for points in lines.values() for x in points})
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
        axes.legend(fontsize=7)
    _write(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    figure = Figure(figsize=(WIDTH * max(1, count), HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, max(1, count), squeeze=False)[0])


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
