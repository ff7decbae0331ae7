"""The plot of the laboratory: step times beside the links' limit, and bytes beside the optimum."""

from __future__ import annotations

from typing import Any

from matplotlib import axes, figure

from benchmarks.links.laboratory import COUNTS, MBIT, busiest, optimum
from benchmarks.links.predicted import limit, median
from benchmarks.links.report import CONTENDERS, MODELS, find


def draw(drawing: figure.Figure, results: dict[str, Any]) -> bool:
    """Draws both panels.

    Returns:
        Whether there was anything to draw.
    """
    if not (results.get("links") or {}).get("runs"):
        return False
    left, right = drawing.subplots(1, 2)
    _times(left, results)
    _bytes(right, results)
    drawing.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return True


def _times(panel: axes.Axes, results: dict[str, Any]) -> None:
    limits: dict[int, float] = {}
    for contender, about in CONTENDERS.items():
        runs = [
            find(results, contender=contender, model="mlp", devices=n, mbit=MBIT) for n in COUNTS
        ]
        found = [run for run in runs if run]
        limits.update({run["devices"]: limit(run) for run in found})
        counts = [run["devices"] for run in found]
        panel.plot(counts, [median(run) for run in found], marker="o", label=about)
    panel.plot(list(limits), list(limits.values()), "k--", label="limit of the links")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(COUNTS, list(map(str, COUNTS)))
    ticks = (0.25, 0.5, 1, 2, 4, 8)
    panel.set_yticks(ticks, list(map(str, ticks)))
    panel.set(xlabel="Devices", ylabel="Seconds a step")
    panel.set_title(f"MLP of 16.8 MB, {MBIT:.0f} Mbit/s", fontsize="medium")


def _bytes(panel: axes.Axes, results: dict[str, Any]) -> None:
    markers = dict(zip(MODELS, ("o", "s", "^"), strict=True))
    for index, contender in enumerate(CONTENDERS):
        for model, marker in markers.items():
            runs = [find(results, contender=contender, model=model, devices=n) for n in COUNTS]
            found = [run for run in runs if run]
            counts = [run["devices"] for run in found]
            ratios = [busiest(run) / optimum(run) for run in found]
            panel.plot(counts, ratios, marker=marker, color=f"C{index}", alpha=0.7)
    panel.axhline(1, color="k", linestyle="--")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(COUNTS, list(map(str, COUNTS)))
    ticks = (1, 1.5, 2, 3, 4)
    panel.set_yticks(ticks, list(map(str, ticks)))
    panel.set(xlabel="Devices", ylabel="Bytes on the busiest link / optimum")
    panel.set_title("o MLP, \u25a1 Xception, \u25b3 Transformer", fontsize="medium")
