"""Time to the first training step and peak memory, each in a fresh process."""

from __future__ import annotations

from typing import Any

from benchmarks.settings import Settings
from benchmarks.speed import RUNNER, key
from parallel_keras.measuring.rounds import Runner

WORKLOAD = "xception"


def measure(settings: Settings) -> dict[str, dict[str, list[float]]]:
    """For each contender the seconds to build, to the first step, and bytes, once a round.

    Nothing is bound to a core here: most of the time is spent before the devices work. Memory is
    the peak of what the process holds, less what it held when the libraries were imported.
    """
    counts = [count for count in settings.start_counts if count > 1]
    who = [("bare", 1), *(("ours", count) for count in counts)]
    who += [("mirrored", count) for count in counts]
    results: dict[str, dict[str, list[float]]] = {
        key(*each): {"build": [], "first": [], "memory": []} for each in who
    }
    for index in range(settings.start_rounds):
        for peer, devices in who:
            if index and 1 < devices < max(counts):
                continue  # only for the plot: once will do
            for name, value in _once(peer, devices).items():
                results[key(peer, devices)][name].append(value)
    return results


def _once(peer: str, devices: int) -> dict[str, Any]:
    spec = {"workload": WORKLOAD, "peer": peer, "devices": devices}
    with Runner(RUNNER, spec) as runner:
        runner.ask("train", 3)
        held = runner.ask("memory")
        memory = held["peak"] - held["baseline"]
        return {"build": runner.start["build"], "first": runner.start["first"], "memory": memory}
