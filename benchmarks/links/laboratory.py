"""What is measured behind the links: who trains what, on how many devices, at which speed."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from benchmarks.links import namespaces
from benchmarks.links.namespaces import Network, Traffic
from benchmarks.links.processes import Process, ask_all

MBIT = 400.0
COUNTS = (2, 4, 8)
# Where weights live and how gradients meet; the first two are towers on servers.
CONTENDERS = ("unmoved", "spread", "workers", "ring")
ON_SERVERS = ("unmoved", "spread")
LARGE_MODELS = ("xception", "transformer")


@dataclasses.dataclass(frozen=True)
class Run:
    """One contender that trains one model.

    Attributes:
        contender: One of `CONTENDERS`, or `"local"`, towers in one process.
        model: A key of `benchmarks.links.models.MODELS`.
        devices: How many.
        mbit: The speed of each link, or `None` for no limit.
        steps: How many are measured.
    """

    contender: str
    model: str
    devices: int
    mbit: float | None = MBIT
    steps: int = 5


# What a step takes without links, what all links can carry together, and what a message takes.
CALIBRATION = (
    *(Run("local", "mlp", count, None, 20) for count in COUNTS),
    *(Run("spread", "mlp", count, None, 10) for count in COUNTS),
    Run("spread", "small", 4, None, 20),
)
TIMES = tuple(
    # A step of weights in one place takes as long as those of several others.
    Run(contender, "mlp", count, MBIT, 3 if contender == "unmoved" and count > 2 else 6)
    for count in COUNTS
    for contender in CONTENDERS
)
BYTES = tuple(
    Run(contender, model, count, None, 2)
    for model in LARGE_MODELS
    for count in COUNTS
    for contender in ("spread", "ring")
)
FULL = (*CALIBRATION, *TIMES, *BYTES)
QUICK = (
    Run("local", "mlp", 4, None, 10),
    Run("spread", "mlp", 4, None, 5),
    Run("spread", "small", 4, None, 10),
    *(Run(contender, "mlp", 4, MBIT, 3) for contender in CONTENDERS),
)


def measure(runs: Sequence[Run] = FULL) -> dict[str, Any]:
    """Does all runs, one after the other.

    Returns:
        A dict with a list `runs` of what `measure_one` returns.

    Raises:
        NoLaboratory: If this machine can make no links.
    """
    namespaces.check()
    # Namespaces outlive the process that made them, so one that is asked to end must remove them.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    done = []
    for run in runs:
        logging.info("links: %s", run)
        done.append(measure_one(run))
    return {"runs": done}


def measure_one(run: Run) -> dict[str, Any]:
    """Does one run.

    Returns:
        A dict of the fields of the run and of
        `seconds`: of each step, from its end to that of the next, where the first worker or the
        script sees it;
        `traffic`: for each device, and last for the script if there is one, the bytes that it sent
        and received in a step;
        `weights`: the bytes of the trainable weights, and `tensors`, how many they are;
        `vector`: the bytes of what workers add up, where they are ours.
    """
    with Network(_namespaces(run)) as network, _started(run, network) as asked:
        ask_all(asked, "train", 2)
        if run.mbit is not None:
            network.limit(run.mbit)
        before = network.traffic()
        seconds = ask_all(asked, "train", run.steps)[0]
        links = [now.since(then) for now, then in zip(network.traffic(), before, strict=True)]
        held = ask_all(asked[:1], "weights")[0]
        if run.contender == "workers":
            held["vector"] = ask_all(asked[:1], "vector")[0]
    steps = run.steps + 1  # the first one is not timed
    return {
        **dataclasses.asdict(run),
        "seconds": seconds,
        "traffic": [[link.sent / steps, link.received / steps] for link in links],
        **held,
    }


def busiest(run: dict[str, Any]) -> float:
    """The bytes of a step on the busiest link, in its busier direction."""
    return max(Traffic(*link).busiest for link in run["traffic"])


def total(run: dict[str, Any]) -> float:
    """The bytes of a step that all devices sent together."""
    return sum(sent for sent, _ in run["traffic"])


def optimum(run: dict[str, Any]) -> float:
    """What no way of training can do without: 2 (N - 1) / N of the weights over each link.

    >>> optimum({"devices": 4, "weights": 100})
    150.0
    """
    return 2 * (run["devices"] - 1) / run["devices"] * run["weights"]


def _namespaces(run: Run) -> int:
    return 1 if run.contender == "local" else run.devices + (run.contender in ON_SERVERS)


@contextlib.contextmanager
def _started(run: Run, network: Network) -> Iterator[list[Process]]:
    """The processes that are asked to train."""
    spec = {
        "model": run.model,
        "devices": run.devices,
        "addresses": network.addresses[: run.devices],
        "script": network.addresses[-1],
        "weights_on": run.contender,
    }
    with contextlib.ExitStack() as stack:

        def start(index: int, role: str) -> Process:
            namespace = network.namespaces[index]
            return stack.enter_context(Process(namespace, role, {**spec, "index": index}))

        if run.contender in ON_SERVERS:
            for server in [start(index, "server") for index in range(run.devices)]:
                server.answer()
            asked = [start(run.devices, "script")]
        else:
            role = {"workers": "worker"}.get(run.contender, run.contender)
            asked = [start(index, role) for index in range(len(network.namespaces))]
        for process in asked:
            process.answer()
        yield asked
