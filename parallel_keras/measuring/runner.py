"""The process that trains one model and is asked, line by line, to run some steps.

Reads `train 10`, `predict 10` or `memory` from its input, and writes one line of JSON for each to
what was its output when it started; anything that a model prints goes to the error stream.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import keras
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.hardware import driver_cards
from parallel_keras.measuring.clock import StepClock, differences

Answer = dict[str, Any]
_LEAST_MEMORY = 8192
# So many runners of one workload take turns, and each keeps what it has.
_RUNNERS_AT_ONCE = 8


def prepare(devices: int, core: int | None = None) -> list[str]:
    """Sets TensorFlow up for so many devices, before it starts its runtime.

    GPUs are used as they are, or the first is split where they are too few. A logical
    CPU gets one thread, as a GPU that is added brings cores of its own.

    Args:
        devices: Int, how many.
        core: The one CPU core that this process may use, where the system can do that.
            Defaults to all.

    Returns:
        The names of the devices.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and len(gpus) < devices:
        return pk.virtual_devices(devices, "GPU", memory_limit=_share_of_card(devices))
    if gpus:
        for gpu in gpus:
            # Runners share the GPUs, and by default the first would take all of their memory.
            tf.config.experimental.set_memory_growth(gpu, enable=True)
        return [f"/device:GPU:{index}" for index in range(devices)]
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(devices)
    return pk.virtual_devices(devices)


def _share_of_card(devices: int) -> int:
    """Megabytes for each of the devices that share a GPU with those of other runners."""
    memories = [card.memory for card in driver_cards()]
    # The least that a GPU of today has, where the driver does not say.
    return min(memories, default=_LEAST_MEMORY) // (_RUNNERS_AT_ONCE * devices)


def forever(data: Any) -> tf.data.Dataset:
    """The same batch again and again; making it takes no time.

    Autotuning is off: it makes steps wait for times that depend on the ones before.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    # tf.data takes a list for one tensor to be stacked, not for several.
    data = keras.tree.lists_to_tuples(data)
    return tf.data.Dataset.from_tensors(data).repeat().with_options(options)


@dataclasses.dataclass
class Contender:
    """A compiled model with one batch of data.

    Args:
        model: What `fit` is called on.
        x: Inputs of one batch.
        y: Targets of one batch.
    """

    model: keras.Model
    x: Any
    y: Any

    def __post_init__(self) -> None:
        """Makes the datasets."""
        self._training = forever((self.x, self.y))
        self._inputs = keras.tree.map_structure(tf.constant, self.x)

    def first_step(self) -> float:
        """Seconds from the call of `fit` to the end of the first step; two more warm up."""
        clock, start = StepClock(), time.perf_counter()
        self._fit(3, clock)
        return clock.ends[0] - start

    def train(self, steps: int) -> list[float]:
        """Seconds of each step of a `fit`, without the first."""
        clock = StepClock()
        self._fit(steps + 1, clock)
        return clock.seconds()

    def predict(self, steps: int) -> list[float]:
        """Seconds of each `predict_on_batch`, whose outputs are dropped.

        `predict` would keep and join the outputs of all steps, which is the same work whatever the
        devices, and with large outputs most of the time.
        """
        self.model.predict_on_batch(self._inputs)
        ends = [time.perf_counter()]
        for _ in range(steps):
            self.model.predict_on_batch(self._inputs)
            ends.append(time.perf_counter())
        return differences(ends)

    def _fit(self, steps: int, clock: StepClock) -> None:
        self.model.fit(
            self._training, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[clock]
        )


def memory() -> Answer:
    """Bytes that this process holds at most, from its start until now."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not from getrusage(): there, a process inherits the peak of the one that started it.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return {"peak": int(lines["VmHWM"].split()[0]) * 1024}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def serve(
    make: Callable[[], Contender],
    extra: Mapping[str, Callable[[Contender, int], Answer]] | None = None,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> None:
    """Makes a contender, tells how long its first step took, then does what it is asked.

    Args:
        make: Makes the contender.
        extra: Further commands by name; each takes the contender and a number of steps.
        lines: What is asked. Defaults to the lines of the standard input.
        out: Where answers go. Defaults to the standard output.
    """
    out = out or _private_output()
    baseline = memory()["peak"]
    start = time.perf_counter()
    contender = make()
    build = time.perf_counter() - start
    first = contender.first_step()
    commands: dict[str, Callable[[Contender, int], Answer]] = {
        "train": lambda contender, steps: _timed(contender.train, steps),
        "predict": lambda contender, steps: _timed(contender.predict, steps),
        "memory": lambda _, __: {**memory(), "baseline": baseline},
        **(extra or {}),
    }
    _write({"build": build, "first": first}, out)
    for line in sys.stdin if lines is None else lines:
        name, _, steps = line.partition(" ")
        _write(commands[name.strip()](contender, int(steps or 0)), out)


def _timed(run: Callable[[int], list[float]], steps: int) -> Answer:
    start = time.process_time()
    seconds = run(steps)
    return {"seconds": seconds, "cpu": (time.process_time() - start) / (steps + 1)}


def _write(answer: Answer, out: TextIO) -> None:
    print(json.dumps(answer), file=out, flush=True)


def _private_output() -> TextIO:
    """The standard output, to which nobody else can write any more."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(output, "w")
