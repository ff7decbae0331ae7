"""All frameworks on the same workloads, each contender in turns with the others."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from absl import logging

from parallel_keras.measuring.rounds import Runner, take_turns

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = "benchmarks.frameworks.runner"
WORKLOADS = ("mlp", "cnn", "words", "xception")
# Where the Python of a framework is, from the top of the repository; `make` sets them up.
ENVIRONMENTS = {"jax": ".venv-jax/bin/python", "torch": ".venv-torch/bin/python"}
# For each contender its framework, the way it trains there, and on how many devices.
CONTENDERS = {
    "keras": ("tensorflow", "bare", 1),
    "ours": ("tensorflow", "ours", 2),
    "mirrored": ("tensorflow", "mirrored", 2),
    "jax": ("jax", "bare", 1),
    "jax-2": ("jax", "distribution", 2),
    "torch": ("torch", "bare", 1),
    "torch-2": ("torch", "ddp", 2),
}


def pythons() -> dict[str, str]:
    """The Python of each framework that is installed."""
    found = {name: ROOT / path for name, path in ENVIRONMENTS.items() if (ROOT / path).exists()}
    return {"tensorflow": sys.executable, **{name: str(path) for name, path in found.items()}}


def missing() -> list[str]:
    """The frameworks that are not installed."""
    return [name for name in ENVIRONMENTS if name not in pythons()]


def measure(rounds: int = 3, seconds: float = 0.8) -> dict[str, Any]:
    """Trains every workload in every framework that is installed.

    Returns:
        A dict from workload to contender to `first`, the seconds of the first step, and `seconds`
        and `cpu` as `take_turns` returns them.
    """
    for name in missing():
        logging.warning("frameworks: %s is left out; make bench-frameworks installs it", name)
    return {workload: _measure(workload, rounds, seconds) for workload in WORKLOADS}


def _measure(workload: str, rounds: int, seconds: float) -> dict[str, Any]:
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with contextlib.ExitStack() as stack:
        runners = {}
        for name, (framework, way, devices) in CONTENDERS.items():
            if framework not in pythons():
                continue
            logging.info("frameworks: %s, %s", workload, name)
            spec = {
                "framework": framework,
                "way": way,
                "workload": workload,
                "devices": devices,
                "core": core if devices == 1 else None,
            }
            runner = Runner(RUNNER, spec, python=pythons()[framework])
            runners[name] = stack.enter_context(runner)
        measured = take_turns(runners, "train", rounds, seconds)
        return {name: {"first": runners[name].start["first"], **measured[name]} for name in runners}
