"""Times of training and predicting, all peers of a workload in turns."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.names import BESIDE_MIRRORED, SPEED_UP_OF
from benchmarks.peers import HALF
from benchmarks.settings import Settings
from parallel_keras.measuring import rounds

RUNNER = "benchmarks.measure"
# As `predict_on_batch` does not cut the batch under a strategy, only these predict.
PREDICTING = ("bare", HALF, "ours")


def key(peer: str, devices: int) -> str:
    """The name of a contender, such as `ours-2`."""
    return f"{peer}-{devices}"


def contenders(workload: str, settings: Settings) -> dict[str, dict[str, Any]]:
    """The specs of all processes for one workload.

    Whoever has one device has one core, too.
    """
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    few = (2,) if settings.quick else (1, 2)
    counts = settings.counts if workload in settings.scaled else few
    who = [("bare", 1), *(("ours", count) for count in counts)]
    if workload in SPEED_UP_OF:
        who.insert(1, (HALF, 1))
    if workload in BESIDE_MIRRORED:
        who += [("spread", 2), ("mirrored", 2)]
    return {
        key(peer, devices): {
            "workload": workload,
            "peer": peer,
            "devices": devices,
            "core": core if devices == 1 else None,
        }
        for peer, devices in who
    }


def measure(workload: str, settings: Settings) -> dict[str, Any]:
    """Everything about the speed of one workload, for each contender by its key."""
    with rounds.runners(RUNNER, contenders(workload, settings)) as every:
        train = rounds.take_turns(every, "train", settings.rounds, settings.seconds)
        predicting = {name: each for name, each in every.items() if name.startswith(PREDICTING)}
        predict = rounds.take_turns(predicting, "predict", settings.rounds, settings.seconds / 2)
        shares = {
            name: every[name].ask("profile", 5)["shares"]
            for name in (key("bare", 1), key("ours", 2), key("mirrored", 2))
            if name in every
        }
    return {"train": train, "predict": predict, "phases": shares}
