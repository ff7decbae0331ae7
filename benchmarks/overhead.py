"""The step of the wrapper on one device beside that of the bare model, in one process.

A few percent of a step of half a millisecond are less than two processes differ by chance, so
both models take turns in one, for a few steps each. Run as `python -m benchmarks.overhead ROUNDS`.
"""

from __future__ import annotations

import json
import statistics
import sys

import parallel_keras as pk
from benchmarks.workloads import WORKLOADS
from parallel_keras.measuring.runner import Contender, prepare

WORKLOAD, STEPS = "tiny", 60


def measure(rounds: int) -> dict[str, list[float]]:
    """The median step of each round, in seconds."""
    workload = WORKLOADS[WORKLOAD]
    x, y = workload.data()
    both = {
        "bare": Contender(workload.compiled(), x, y),
        "ours": Contender(pk.DataParallelModel(workload.compiled(), 1), x, y),
    }
    for contender in both.values():
        contender.train(2 * STEPS)
    medians: dict[str, list[float]] = {name: [] for name in both}
    for index in range(rounds):
        # Who comes first changes: the second finds caches and clocks in another state.
        for name in sorted(both, reverse=bool(index % 2)):
            medians[name].append(statistics.median(both[name].train(STEPS)))
    return medians


def main() -> None:
    """Prints what `measure` returns as JSON."""
    prepare(1)
    print(json.dumps(measure(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
