"""What `bench` measures, and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

import keras
import tensorflow as tf

from parallel_keras.measuring import rounds, subject
from parallel_keras.measuring.clock import Spread, ratios

BASE: Final = "model"


@dataclasses.dataclass(frozen=True)
class Line:
    """What was measured on one number of devices; times in seconds, memory in bytes.

    Attributes:
        devices: Int, how many.
        wrapped: Whether this is a `DataParallelModel`; the base is not.
        train: The `Spread` of the time of a training step.
        train_speed_up: The `Spread` of how many times faster than the base.
        predict: The `Spread` of the time to predict a batch.
        predict_speed_up: Likewise.
        first_step: Float, the time from the call of `fit` to the end of its first step.
        memory: Int, the most memory that the process held on the host, without the libraries.
    """

    devices: int
    wrapped: bool
    train: Spread
    train_speed_up: Spread
    predict: Spread
    predict_speed_up: Spread
    first_step: float
    memory: int


def measure(
    contenders: Mapping[str, Any], specs: Mapping[str, subject.Subject], turns: int, seconds: float
) -> list[Line]:
    """Has the runners take turns.

    Args:
        contenders: Workers by name; the one named `BASE` is what the others are compared with.
        specs: What each of them trains.
        turns: Int, the number of rounds.
        seconds: Float, the length of a turn.

    Returns:
        A `Line` for each of them.
    """
    train = rounds.take_turns(contenders, "train", turns, seconds)
    predict = rounds.take_turns(contenders, "predict", turns, seconds / 2)
    lines = []
    for name, runner in contenders.items():
        held = runner.ask("memory")
        lines.append(
            Line(
                devices=specs[name].devices,
                wrapped=specs[name].wrapped,
                train=Spread.of(train[name]["seconds"]),
                train_speed_up=ratios(train[BASE]["seconds"], train[name]["seconds"]),
                predict=Spread.of(predict[name]["seconds"]),
                predict_speed_up=ratios(predict[BASE]["seconds"], predict[name]["seconds"]),
                first_step=runner.start["first"],
                memory=held["peak"] - held["baseline"],
            )
        )
    return lines


def table(lines: Sequence[Line], batch_size: int, limit: int | None) -> str:
    """The results as text.

    Args:
        lines: What `measure` returned.
        batch_size: Int, the rows of a batch.
        limit: Int, beyond how many devices nothing more can be gained, or `None`.

    Returns:
        The lines of a table.
    """
    heads = ("", "ms a step", "rows/s", "speed-up", "limit", "predict", "first step", "memory")
    cells = [heads]
    for line in lines:
        most = line.devices if limit is None else min(line.devices, limit)
        cells.append(
            (
                f"{line.devices} device(s)" if line.wrapped else "without wrapper",
                _significant(line.train.median * 1e3),
                _significant(batch_size / line.train.median),
                _range(line.train_speed_up),
                str(most),
                _range(line.predict_speed_up),
                f"{line.first_step:.1f} s",
                f"{line.memory / 2**20:.0f} MB",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def report(lines: Sequence[Line], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results as JSON, with what they depend on."""
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    machine = {"python": platform.python_version(), "cores": cores(), "gpus": gpus()}
    return {
        "settings": dict(settings),
        "versions": versions,
        "machine": machine,
        "lines": [dataclasses.asdict(line) for line in lines],
    }


def notes(counts: Sequence[int]) -> str:
    """What a reader of the table must know."""
    lines = [
        "Medians of the rounds, in brackets the middle half of them. speed-up: how many times as "
        "fast as without wrapper; limit: what it could be at most."
    ]
    if not gpus() and max(counts) > cores():
        lines.append(
            f"More logical CPUs than the {cores()} cores: they show what more devices cost, not "
            "what they gain."
        )
    return "\n".join(lines)


def _range(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _significant(value: float) -> str:
    """Three digits, also of small numbers."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def gpus() -> int:
    """How many GPUs there are."""
    return len(tf.config.list_physical_devices("GPU"))


def usable_cores() -> list[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """How many of them."""
    return len(usable_cores())


def kind() -> str:
    """What the devices are."""
    return "GPUs" if gpus() else f"logical CPUs ({cores()} cores)"
