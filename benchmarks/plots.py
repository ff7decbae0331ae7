"""Plots of what was measured, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import figure

from benchmarks.judge import Results, speed_up
from benchmarks.links import plot as links
from benchmarks.names import ABOUT, PHASES
from parallel_keras.measuring.clock import Spread

# The same numbers then give the same file, so that a new run changes only what it measured anew.
mpl.rcParams["svg.hashsalt"] = "parallel_keras"
METADATA = {"Date": None}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws what was measured.

    Returns:
        The files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"speed-up": _speed_up, "first-step": _first_step, "memory": _memory}
    drawings |= {"phases": _phases, "links": links.draw}
    written = []
    for name, do in drawings.items():
        drawing = figure.Figure(figsize=(7, 4), layout="constrained")
        if do(drawing, results):
            path = folder / f"{name}.svg"
            drawing.savefig(path, metadata=METADATA)
            written.append(path)
    return written


def _speed_up(drawing: figure.Figure, results: Results) -> bool:
    axes = drawing.subplots()
    cores = results["machine"]["cores"]
    counts: set[int] = set()
    for workload, measured in results["speed"].items():
        towers = sorted(
            int(name.partition("-")[2]) for name in measured["train"] if name.startswith("ours-")
        )
        if len(towers) <= 2:
            continue
        counts.update(towers)
        spreads = [speed_up(results, workload, "train", count) for count in towers]
        middle = [spread.median for spread in spreads]
        errors = [
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ]
        axes.errorbar(towers, middle, errors, marker="o", capsize=3, label=ABOUT[workload])
    if not counts:
        return False
    every = sorted(counts)
    axes.plot(every, [min(count, cores) for count in every], "k--", label=f"limit, {cores} cores")
    axes.axvspan(cores * 1.1, max(every) * 1.1, color="0.93", zorder=0)
    axes.text(max(every), 0.3, "more towers than cores", ha="right", color="0.4")
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, list(map(str, every)))
    axes.set(xlabel="Towers", ylim=(0, None), title="Training, beside the bare model on one core")
    axes.set_ylabel("Times as fast")
    axes.legend(loc="upper left")
    return True


def _first_step(drawing: figure.Figure, results: Results) -> bool:
    return _bars(drawing, results, "first", 1.0, "Time to the first training step, Xception", "s")


def _memory(drawing: figure.Figure, results: Results) -> bool:
    return _bars(drawing, results, "memory", 2**20, "Peak memory of training, Xception", "MB")


def _bars(
    drawing: figure.Figure, results: Results, what: str, unit: float, title: str, label: str
) -> bool:
    start = results.get("start") or {}
    if not start:
        return False
    axes = drawing.subplots()
    counts = sorted({int(name.partition("-")[2]) for name in start})
    peers = {"bare": "bare model", "ours": "parallel_keras", "mirrored": "MirroredStrategy"}
    for index, (peer, named) in enumerate(peers.items()):
        found = [
            (place, Spread.of(start[f"{peer}-{count}"][what]).median / unit)
            for place, count in enumerate(counts)
            if f"{peer}-{count}" in start
        ]
        places, values = zip(*found, strict=True)
        shifted = [place + 0.27 * (index - 1) for place in places]
        bars = axes.bar(shifted, values, width=0.26, label=named)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(counts)), list(map(str, counts)))
    axes.set(xlabel="Devices", ylabel=label, title=title)
    axes.legend(loc="upper left")
    return True


def _phases(drawing: figure.Figure, results: Results) -> bool:
    lines: list[tuple[str, dict[str, Any]]] = [
        (ABOUT[workload].split(",")[0], shares)
        for workload, measured in results["speed"].items()
        for name, shares in measured["phases"].items()
        if name == "ours-2"
    ]
    if not lines:
        return False
    axes = drawing.subplots()
    left = [0.0] * len(lines)
    for phase in PHASES:
        widths = [100 * shares[phase] for _, shares in lines]
        axes.barh([label for label, _ in lines], widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="Percent of a training step", title="Where the time goes, 2 towers")
    drawing.legend(loc="outside lower center", ncols=3, fontsize="small")
    return True
