"""The process that trains one workload in one framework. Needs Keras and that framework only.

Started with a JSON spec. Reads `train 10` from its input, and writes one line of JSON for it, as
`parallel_keras.measuring.runner` does, which needs TensorFlow.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

# Trains so many steps and returns the end of each, in seconds.
Train = Callable[[int], list[float]]


def prepare(spec: dict[str, Any]) -> None:
    """What must be set before a framework is imported."""
    if spec.get("core") is not None:
        os.sched_setaffinity(0, {spec["core"]})
    os.environ["KERAS_BACKEND"] = spec["framework"]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if spec["framework"] == "jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={spec['devices']}"


def make(spec: dict[str, Any]) -> Train:
    """What trains, by the framework and the way of the spec."""
    from benchmarks.frameworks import trainers

    return trainers.TRAINERS[spec["framework"]](spec)


def serve(train: Train, started: float, lines: Iterable[str], out: TextIO) -> None:
    """Tells how long the first step took, then does what it is asked.

    Args:
        train: Trains.
        started: When all libraries were there.
        lines: What is asked.
        out: Where answers go.
    """
    built = time.perf_counter()
    first = train(3)[0]
    _write({"build": built - started, "first": first - built}, out)
    for line in lines:
        _, _, steps = line.partition(" ")
        cpu = time.process_time()
        ends = train(int(steps) + 1)
        spent = (time.process_time() - cpu) / len(ends)
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        _write({"seconds": seconds, "cpu": spent}, out)


def _write(answer: dict[str, Any], out: TextIO) -> None:
    print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    """Serves the spec in the first argument."""
    spec = json.loads(sys.argv[1])
    prepare(spec)
    # Frameworks print; answers must not stand among that.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import keras  # noqa: F401 (takes seconds, which are no part of building a model)

    started = time.perf_counter()
    serve(make(spec), started, sys.stdin, own)


if __name__ == "__main__":
    main()
