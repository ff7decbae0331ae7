"""What the frameworks need for the same workloads: rows of the table of bars, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.frameworks.race import WORKLOADS
from benchmarks.names import ABOUT
from benchmarks.row import Row, not_measured
from parallel_keras.measuring.clock import Spread, ratios

Measured = dict[str, Any]
# What each line of the table is called, and who trains on one core and on two devices.
WAYS = (
    ("TensorFlow, parallel_keras", "keras", "ours"),
    ("TensorFlow, MirroredStrategy", "keras", "mirrored"),
    ("JAX, keras.distribution.DataParallel", "jax", "jax-2"),
    ("PyTorch, DistributedDataParallel", "torch", "torch-2"),
)
OTHERS = ("jax-2", "torch-2")


def rows(results: dict[str, Any]) -> list[Row]:
    """The rows of the table of bars."""
    measured = results.get("frameworks") or {}
    return [_faster(measured.get(workload, {}), workload) for workload in WORKLOADS]


def table(results: dict[str, Any]) -> tuple[tuple[str, ...], Iterable[tuple[str, ...]]]:
    """Heads and lines of the table."""
    heads = (
        "workload",
        "Keras on",
        "one core, ms",
        "two devices, ms",
        "ratio within the framework",
        "first step on one, s",
        "on two, s",
    )
    lines = [
        (ABOUT[workload], name, *_cells(measured.get(one), measured.get(two)))
        for workload, measured in (results.get("frameworks") or {}).items()
        for name, one, two in WAYS
        if one in measured and two in measured
    ]
    return heads, lines


def _cells(one: Measured, two: Measured) -> tuple[str, ...]:
    ratio = ratios(one["seconds"], two["seconds"])
    return (
        _milliseconds(one),
        _milliseconds(two),
        f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
        f"{one['first']:.1f}",
        f"{two['first']:.1f}",
    )


def _milliseconds(measured: Measured) -> str:
    value = 1e3 * Spread.of(measured["seconds"]).median
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _faster(measured: dict[str, Measured], workload: str) -> Row:
    measure = f"Step on 2 devices, Keras on JAX or PyTorch beside parallel_keras: {ABOUT[workload]}"
    if not {"ours", *OTHERS} <= set(measured):
        return not_measured(measure, "> 1, both")
    found = {
        name: ratios(measured[name]["seconds"], measured["ours"]["seconds"]) for name in OTHERS
    }
    figure = ", ".join(f"{spread.median:.2f}" for spread in found.values())
    passed = min(spread.median for spread in found.values()) > 1
    return Row(measure, figure, "> 1, both", passed)
