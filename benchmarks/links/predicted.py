"""What the cost model says of the laboratory, from runs in which no link was limited."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from benchmarks import cost_model
from benchmarks.cost_model import Exchange, Links
from benchmarks.links.laboratory import total

Run = dict[str, Any]
WITHIN = 0.2
# What of the bits of a link is payload: an Ethernet frame of 1514 bytes has 1448 that are TCP's.
PAYLOAD = 1448 / 1514


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What does not depend on the speed of the links.

    Attributes:
        compute: Seconds of a step in one process, for each number of devices.
        together: Bytes a second that TensorFlow and the kernel can hand over on these cores.
        latency: Seconds of a message.
    """

    compute: dict[int, float]
    together: float
    latency: float

    @classmethod
    def of(cls, runs: list[Run]) -> Calibration | None:
        """From the runs without limited links; `None` if they are not there."""
        local = [run for run in runs if run["contender"] == "local"]
        small = [run for run in runs if run["model"] == "small"]
        free = [run for run in runs if _free(run)]
        if not (local and small and free):
            return None
        compute = {run["devices"]: median(run) for run in local}
        # A net of tiny layers does nothing else than hand them over.
        latency = statistics.median(
            median(run) / sum(phase.messages for phase in exchange(run)) for run in small
        )
        moved = [run for run in free if run["devices"] in compute]
        busy = sum(
            median(run)
            - compute[run["devices"]]
            - latency * sum(phase.messages for phase in exchange(run))
            for run in moved
        )
        together = sum(map(total, moved)) / busy if busy > 0 else float("inf")
        return cls(compute, together, latency)


def median(run: Run) -> float:
    """The median of its step times, in seconds."""
    return statistics.median(run["seconds"])


def exchange(run: Run) -> Exchange:
    """What moves in a step of a run, as the model has it."""
    size, tensors, devices = run["weights"], run["tensors"], run["devices"]
    if run["contender"] == "unmoved":
        return cost_model.one_place(size, tensors, devices)
    if run["contender"] == "spread":
        return cost_model.spread(size, tensors, devices)
    if run["contender"] == "ring":
        return cost_model.ring(size, devices, tensors)
    # Our workers add up one vector, which holds more than the gradients.
    return cost_model.ring(run.get("vector") or size, devices)


def seconds(run: Run, calibration: Calibration) -> float:
    """What a step of a run takes, as the model has it."""
    rate = run["mbit"] * 1e6 / 8 * PAYLOAD if run["mbit"] else float("inf")
    links = Links(rate, calibration.together, calibration.latency)
    return cost_model.step(calibration.compute[run["devices"]], exchange(run), links)


def limit(run: Run) -> float:
    """What a step takes at least on links of that speed, whoever sends what: see `optimum`."""
    share = (run["devices"] - 1) / run["devices"]
    return 2 * share * run["weights"] / (run["mbit"] * 1e6 / 8 * PAYLOAD)


def checked(results: dict[str, Any]) -> list[tuple[Run, float]]:
    """The runs behind limited links, each with what was predicted."""
    runs = (results.get("links") or {}).get("runs", [])
    calibration = Calibration.of(runs)
    if calibration is None:
        return []
    return [
        (run, seconds(run, calibration))
        for run in runs
        if run["mbit"] and run["devices"] in calibration.compute
    ]


def worst(results: dict[str, Any]) -> float | None:
    """The largest relative error of the model behind limited links; `None` if not measured."""
    pairs = checked(results)
    return max(abs(said / median(run) - 1) for run, said in pairs) if pairs else None


def _free(run: Run) -> bool:
    return run["contender"] == "spread" and run["model"] == "mlp" and not run["mbit"]
