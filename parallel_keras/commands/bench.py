"""Trains your own model on one device and on several, and compares the times.

The model is one of keras.applications, or a saved file of yours. It is fed one batch of random
numbers of its input shape, again and again, so no input pipeline is measured. Every number of
devices runs in a process of its own; they take turns, and the first steps do not count. The base
is the model itself on one device. Where there is no GPU, devices are logical CPUs with one thread
each, and the base has one CPU core: more of them than cores cannot be faster.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

import keras
import tensorflow as tf
from absl import flags

from parallel_keras.commands import CommandError
from parallel_keras.measuring import rounds, subject
from parallel_keras.measuring.clock import Spread, ratios

_MODEL = flags.DEFINE_string(
    "model", None, "A name from keras.applications, such as Xception, or the path to a saved model."
)
_DEVICES = flags.DEFINE_list("devices", ["1", "2"], "Numbers of devices, such as 1,2,4.")
_BATCH_SIZE = flags.DEFINE_integer("batch-size", 32, "Rows of the whole batch.", lower_bound=1)
_OPEN_SIZE = flags.DEFINE_integer(
    "open-size",
    128,
    "The size of axes that the model leaves open, such as the length of a text.",
    lower_bound=1,
)
_LOSS = flags.DEFINE_string(
    "loss", None, "The name of a loss. By default the model's own, else the mean squared error."
)
_IMPORTS = flags.DEFINE_list(
    "imports", [], "Modules to import first: those that register the model's own layers."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each process has its turn.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long a turn is, about.", lower_bound=0.0)
_JSON = flags.DEFINE_bool("json", False, "Print the results as JSON, and nothing else.")

WORKER: Final = "parallel_keras.measuring.subject"
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
    """Has the workers take turns.

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
    for name, worker in contenders.items():
        held = worker.ask("memory")
        lines.append(
            Line(
                devices=specs[name].devices,
                wrapped=specs[name].wrapped,
                train=Spread.of(train[name]["seconds"]),
                train_speed_up=ratios(train[BASE]["seconds"], train[name]["seconds"]),
                predict=Spread.of(predict[name]["seconds"]),
                predict_speed_up=ratios(predict[BASE]["seconds"], predict[name]["seconds"]),
                first_step=worker.start["first"],
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
    machine = {"python": platform.python_version(), "cores": _cores(), "gpus": _gpus()}
    return {
        "settings": dict(settings),
        "versions": versions,
        "machine": machine,
        "lines": [dataclasses.asdict(line) for line in lines],
    }


def main() -> None:
    """Runs the command."""
    counts = _counts(_DEVICES.value)
    if not _MODEL.value:
        raise CommandError(
            "There is no model to measure. Expected: --model=Xception, or another name from "
            "keras.applications, or the path to a saved model. Received: --model is not set."
        )
    try:
        subject.check_name(_MODEL.value)
    except ValueError as error:
        raise CommandError(str(error)) from error
    specs = _specs(_MODEL.value, counts)
    if not _JSON.value:
        print(f"{_MODEL.value}, batches of {_BATCH_SIZE.value} rows, on {_kind()}", flush=True)
    try:
        described = {name: dataclasses.asdict(spec) for name, spec in specs.items()}
        with rounds.workers(WORKER, described) as contenders:
            lines = measure(contenders, specs, _ROUNDS.value, _SECONDS.value)
    except rounds.WorkerFailed as error:
        raise CommandError(
            f"A process that trained the model ended: {error} If the model has layers of its own, "
            "name their module with --imports; if its loss does not take random targets shaped "
            "like its outputs, choose one with --loss; if memory ran out, a smaller --batch-size."
        ) from error
    if _JSON.value:
        settings = {"batch_size": _BATCH_SIZE.value, **dataclasses.asdict(specs[BASE])}
        print(json.dumps(report(lines, settings)))
        return
    print(table(lines, _BATCH_SIZE.value, None if _gpus() else _cores()))
    print(_notes(counts))


def _counts(values: Sequence[str]) -> list[int]:
    counts = [int(value) for value in values if value.strip().isdigit() and int(value)]
    if not values or len(counts) < len(values) or len(set(counts)) < len(counts):
        raise CommandError(
            "Expected different numbers of devices, such as --devices=1,2,4. "
            f"Received: --devices={','.join(values)}."
        )
    gpus = _gpus()
    if gpus and max(counts) > gpus:
        raise CommandError(
            f"There are not as many GPUs as asked for. Expected: at most {gpus}. "
            f"Received: --devices={','.join(values)}."
        )
    return counts


def _specs(model: str, counts: Sequence[int]) -> dict[str, subject.Subject]:
    # Its turn must not be on the core where the system does most of its own work.
    core = None if _gpus() else max(_own_cores())
    base = subject.Subject(
        model=model,
        devices=1,
        wrapped=False,
        batch_size=_BATCH_SIZE.value,
        open_size=_OPEN_SIZE.value,
        loss=_LOSS.value,
        imports=_IMPORTS.value,
        core=core,
    )
    wrapped = {
        str(count): dataclasses.replace(
            base, devices=count, wrapped=True, core=core if count == 1 else None
        )
        for count in counts
    }
    return {BASE: base, **wrapped}


def _notes(counts: Sequence[int]) -> str:
    lines = [
        "Medians of the rounds, in brackets the middle half of them. speed-up: how many times as "
        "fast as without wrapper; limit: what it could be at most."
    ]
    if not _gpus() and max(counts) > _cores():
        lines.append(
            f"More logical CPUs than the {_cores()} cores: they show what more devices cost, not "
            "what they gain."
        )
    return "\n".join(lines)


def _range(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _significant(value: float) -> str:
    """Three digits, also of small numbers."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def _gpus() -> int:
    return len(tf.config.list_physical_devices("GPU"))


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores() -> int:
    return len(_own_cores())


def _kind() -> str:
    return "GPUs" if _gpus() else f"logical CPUs ({_cores()} cores)"
