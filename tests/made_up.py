"""Results as the laboratory of links and the race of frameworks would give them, made up."""

from typing import Any

from benchmarks import cost_model
from benchmarks.frameworks import race
from benchmarks.links import laboratory
from benchmarks.links.predicted import PAYLOAD

WEIGHTS, TENSORS = 16_000_000, 32
COMPUTE, LATENCY, TOGETHER = 0.05, 1e-4, 1e9


def run(one: laboratory.Run, seconds: float | None = None) -> dict[str, Any]:
    """What a run would measure in a world that is as the cost model has it."""
    size = 0 if one.model == "small" else WEIGHTS
    found: dict[str, Any] = {
        "contender": one.contender,
        "model": one.model,
        "devices": one.devices,
        "mbit": one.mbit,
        "steps": 3,
        "weights": size,
        "tensors": TENSORS,
    }
    if one.contender == "local":
        return {**found, "seconds": [COMPUTE] * 3, "traffic": [[0.0, 0.0]]}
    moved = {
        "unmoved": cost_model.one_place(size, TENSORS, one.devices),
        "spread": cost_model.spread(size, TENSORS, one.devices),
        "ring": cost_model.ring(size, one.devices, TENSORS),
    }.get(one.contender, cost_model.ring(size, one.devices))
    rate = one.mbit * 1e6 / 8 * PAYLOAD if one.mbit else float("inf")
    links = cost_model.Links(rate, TOGETHER, LATENCY)
    computing = 0.0 if one.model == "small" else COMPUTE
    took = cost_model.step(computing, moved, links) if seconds is None else seconds
    busiest = sum(phase.busiest for phase in moved)
    others = (sum(phase.total for phase in moved) - busiest) / max(one.devices - 1, 1)
    traffic = [[busiest, busiest / 2], *[[others, others]] * (one.devices - 1)]
    return {**found, "seconds": [took] * 3, "traffic": traffic}


def runs() -> list[dict[str, Any]]:
    """Those of a full run."""
    return [run(one) for one in laboratory.FULL]


def frameworks() -> dict[str, Any]:
    """Steps of 1 s on one core, of 0.5 s here on two devices, of 0.6 s elsewhere."""
    steps = {
        name: 1.0 if devices == 1 else 0.6 for name, (_, _, devices) in race.CONTENDERS.items()
    }
    steps["ours"] = 0.5
    return {
        workload: {
            name: {"first": 10 * step, "seconds": [step] * 3, "cpu": [step] * 3}
            for name, step in steps.items()
        }
        for workload in race.WORKLOADS
    }
