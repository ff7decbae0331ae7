"""From the times of a step to why it is not faster. Pure: knows nothing of models."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Final

from parallel_keras.explaining.step_times import StepTimes, TowerTimes

# A step with this much of the speed-up that the devices could give at most is good.
GOOD: Final = 0.8
# Equal devices differ by noise; one that is this many times as slow as the others does not.
SLOW: Final = 1.5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a step is not faster.

    Attributes:
        cause: String, `"none"`, `"one device"`, `"eager"`, `"input"`, `"slow device"`,
            `"merging"`, `"small batch"`, `"shared hardware"` or `"sharding"`.
        finding: String, a sentence with the numbers that show it.
        remedy: String, what to do about it.
    """

    cause: str
    finding: str
    remedy: str


def judge(times: StepTimes) -> Verdict:
    """Says why a step is not as much faster as there are devices.

    Args:
        times: The `StepTimes`.

    Returns:
        The `Verdict`.
    """
    obvious = _obvious(times)
    if obvious is not None:
        return obvious
    if times.batch_size < len(times.towers):
        return _verdict("small batch", times)
    lost = times.step - times.template / len(times.towers)
    for cause, milliseconds in (
        ("slow device", _slowness(times)),
        ("merging", times.merging if times.loss_on == "merged" else 0.0),
    ):
        if milliseconds > lost / 2:
            return _verdict(cause, times)
    causes = {
        "small batch": sum(_fixed_costs(times).values()),
        "shared hardware": max(0.0, times.together - _slowest(times).busy),
        "sharding": times.sharding,
    }
    return _verdict(max(causes, key=causes.__getitem__), times)


def _obvious(times: StepTimes) -> Verdict | None:
    """What needs no weighing of causes."""
    if times.eager:
        return Verdict(
            "eager",
            "The model was compiled with run_eagerly=True: towers run one after the other.",
            "Compile without run_eagerly.",
        )
    if times.reading is not None and times.reading > times.step:
        return Verdict(
            "input",
            f"Reading a batch takes {times.reading:.2f} ms and a step {times.step:.2f} ms: the "
            "devices wait for input.",
            "Make reading faster: dataset.map(..., num_parallel_calls=tf.data.AUTOTUNE), .cache(), "
            ".prefetch(tf.data.AUTOTUNE), or more workers of a PyDataset.",
        )
    if len(times.towers) == 1:
        return Verdict(
            "one device",
            f"There is one device, and the step takes {times.step / times.template:.2f} times as "
            "long as the bare template's.",
            "Give it more devices.",
        )
    if times.efficiency >= GOOD:
        return Verdict(
            "none",
            f"{len(times.towers)} devices are {times.speed_up:.2f} times as fast as one.",
            "Nothing to do.",
        )
    return None


def _slowest(times: StepTimes) -> TowerTimes:
    return max(times.towers, key=lambda tower: tower.busy)


def _usual(times: StepTimes) -> float:
    """The median work of a tower, without that of the slowest."""
    busy = sorted(tower.busy for tower in times.towers if tower.rows)
    return statistics.median(busy[:-1] or busy)


def _slowness(times: StepTimes) -> float:
    slowest, usual = _slowest(times).busy, _usual(times)
    return slowest - usual if slowest > SLOW * usual else 0.0


def _fixed_costs(times: StepTimes) -> dict[str, float]:
    """What takes as long however many rows there are, in milliseconds."""
    stiffness = _usual(times) - times.whole_batch / len(times.towers)
    return {
        "starting": times.starting,
        "in the towers": max(0.0, stiffness),
        "copying weights": times.weights_out,
        "adding up gradients": times.merging if times.loss_on == "towers" else 0.0,
        "updating weights": times.update,
    }


def _verdict(cause: str, times: StepTimes) -> Verdict:
    return Verdict(cause, *_TEXTS[cause](times))


def _slow_device(times: StepTimes) -> tuple[str, str]:
    slowest = _slowest(times)
    return (
        f"{slowest.device} needs {slowest.busy:.2f} ms for its part of the batch, the others "
        f"{_usual(times):.2f} ms: they wait for it.",
        "See what else runs on it (nvidia-smi for GPUs), or leave it out: devices=[...].",
    )


def _merging(times: StepTimes) -> tuple[str, str]:
    finding = (
        f"Joining the outputs on {times.merge_device}, with the loss there, takes "
        f"{times.merging:.2f} ms of {times.step:.2f} ms."
    )
    if times.may_divide:
        return (
            finding,
            'Use loss_on="towers" if your loss looks at one row at a time: then outputs never '
            "leave their device.",
        )
    return (
        finding,
        "This loss needs the whole batch, so make the outputs smaller (project them inside the "
        'model), or merge on a faster device, such as merge_device="GPU:0".',
    )


def _small_batch(times: StepTimes) -> tuple[str, str]:
    costs = _fixed_costs(times)
    listed = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in costs.items())
    return (
        f"The batch of {times.batch_size} rows is too small: {sum(costs.values()):.2f} ms of "
        f"{times.step:.2f} ms go to what takes as long however few the rows are ({listed}).",
        "Use a larger batch_size (it is that of all devices together), or fewer devices. If you "
        "change the batch size, choose the learning rate for it: it is not scaled for you.",
    )


def _shared_hardware(times: StepTimes) -> tuple[str, str]:
    return (
        f"The towers take {times.together:.2f} ms at the same time, but the slowest of them "
        f"{_slowest(times).busy:.2f} ms by itself: they share the same hardware.",
        "Use devices with cores of their own: of logical CPUs no more than there are cores, of "
        "logical GPUs one for each card. See also what else runs on this machine.",
    )


def _sharding(times: StepTimes) -> tuple[str, str]:
    return (
        f"Cutting the batch and copying the parts takes {times.sharding:.2f} ms of "
        f"{times.step:.2f} ms.",
        "Make the inputs smaller (uint8 images, say, that the model scales itself), or use fewer "
        "devices.",
    )


_TEXTS: Final[dict[str, Callable[[StepTimes], tuple[str, str]]]] = {
    "slow device": _slow_device,
    "merging": _merging,
    "small batch": _small_batch,
    "shared hardware": _shared_hardware,
    "sharding": _sharding,
}
