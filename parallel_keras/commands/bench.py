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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from absl import flags

from parallel_keras.commands import CommandError, _flags

if TYPE_CHECKING:
    from parallel_keras.commands.speeds import Line
    from parallel_keras.measuring.subject import Subject

_MODEL = _flags.define_model()
_DEVICES = flags.DEFINE_list(
    "devices",
    None,
    "How many devices to use: 1, 2, 4 and so on up to that number, or, of several numbers such as "
    "1,3, exactly these. By default, all GPUs, or two logical CPUs if there is no GPU.",
)
_BATCH_SIZE = _flags.define_batch_size()
_OPEN_SIZE = _flags.define_open_size()
_LOSS = _flags.define_loss()
_IMPORTS = _flags.define_imports()
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each process has its turn.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long a turn is, about.", lower_bound=0.0)
_JSON = _flags.define_json()

RUNNER: Final = "parallel_keras.measuring.subject"


def main(model: str | None = None) -> None:
    """Runs the command."""
    # These start TensorFlow.
    from parallel_keras.commands import speeds
    from parallel_keras.commands.machine import choose_model

    name = choose_model(model, _MODEL.value)
    counts = _counts(_DEVICES.value, speeds.gpus())
    specs = _specs(name, counts)
    if not _JSON.value:
        print(f"{name}, batches of {_BATCH_SIZE.value} rows, on {speeds.kind()}", flush=True)
    lines = _measure(specs)
    if _JSON.value:
        settings = {"batch_size": _BATCH_SIZE.value, **dataclasses.asdict(specs[speeds.BASE])}
        print(json.dumps(speeds.report(lines, settings)))
        return
    limit = None if speeds.gpus() else speeds.cores()
    print(speeds.table(lines, _BATCH_SIZE.value, limit))
    print(speeds.notes(counts))


def _measure(specs: Mapping[str, Subject]) -> list[Line]:
    from parallel_keras.commands import speeds
    from parallel_keras.measuring import rounds

    try:
        described = {name: dataclasses.asdict(spec) for name, spec in specs.items()}
        with rounds.runners(RUNNER, described) as contenders:
            return speeds.measure(contenders, specs, _ROUNDS.value, _SECONDS.value)
    except rounds.RunnerFailed as error:
        raise CommandError(
            f"A process that trained the model ended: {error} If the model has layers of its own, "
            "name their module with --imports; if its loss does not take random targets shaped "
            "like its outputs, choose one with --loss; if memory ran out, a smaller --batch-size."
        ) from error


def _counts(values: Sequence[str] | None, gpus: int) -> list[int]:
    """The numbers of devices to measure."""
    if values is None:
        return _up_to(gpus or 2)
    counts = [int(value) for value in values if value.strip().isdigit() and int(value)]
    if not values or len(counts) < len(values) or len(set(counts)) < len(counts):
        raise CommandError(
            "Expected a number of devices, or several different ones, such as --devices=1,2,4. "
            f"Received: --devices={','.join(values)}."
        )
    if gpus and max(counts) > gpus:
        raise CommandError(
            f"There are not as many GPUs as asked for. Expected: at most {gpus}. "
            f"Received: --devices={','.join(values)}."
        )
    return counts if len(counts) > 1 else _up_to(counts[0])


def _up_to(most: int) -> list[int]:
    """1, 2, 4 and so on, and the number itself.

    Example:
    >>> from parallel_keras.commands import bench
    >>> bench._up_to(6), bench._up_to(1)
    ([1, 2, 4, 6], [1])
    """
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def _specs(model: str, counts: Sequence[int]) -> dict[str, Subject]:
    from parallel_keras.commands import speeds
    from parallel_keras.measuring.subject import Subject

    # Its turn must not be on the core where the system does most of its own work.
    core = None if speeds.gpus() else max(speeds.usable_cores())
    base = Subject(
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
    return {speeds.BASE: base, **wrapped}
