"""Where the time of a training step went."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TowerTimes:
    """What one tower did in a step, in milliseconds.

    Attributes:
        device: String, the name of its device.
        rows: Int, the rows it was given.
        forward: Float, the call of the template.
        backward: Float, its part of the loss (where the towers compute it) and the gradients.
        waiting: Float, how much earlier it was done than the slowest tower.
    """

    device: str
    rows: int
    forward: float
    backward: float
    waiting: float

    @property
    def busy(self) -> float:
        """Milliseconds of work."""
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Where the time of one training step goes.

    All times are in milliseconds, the shortest of several runs. `starting` to `update` are
    differences of the step cut off after each piece, so they add up to `step` but for noise. The
    times of single towers were taken with no other tower running.

    Attributes:
        batch_size: Int, the rows of the batch.
        loss_on: String, `"towers"` or `"merged"`: where the loss was computed.
        why_merged: String, why it was not computed on the towers; empty if it was.
        may_divide: Bool, whether `loss_on="towers"` can be asked for with this loss.
        merge_device: String, the device that merges.
        towers: Tuple of `TowerTimes`, one for each device.
        starting: Float, calling a step that does nothing.
        sharding: Float, cutting the batch and copying the parts to their devices.
        weights_out: Float, reading the weights and copying them to the devices.
        together: Float, all towers at the same time.
        merging: Float, adding up gradients and state; where `loss_on` is `"merged"` also joining
            the outputs, the loss of the whole batch and its gradient.
        update: Float, the optimizer.
        step: Float, the whole step of the parallel model, as `fit` runs it.
        template: Float, the whole step of the bare template, on the first device.
        whole_batch: Float, forward and backward of the whole batch on the first device.
        reading: Float, reading one batch, or `None` if no dataset was given.
        eager: Bool, whether the model was compiled with `run_eagerly=True`.
        homes: Dict from each device that weights live on to their bytes.
        busiest: String, the device with the most bytes to receive, or to send, in a step; empty
            if nothing goes from device to device, or it is not known.
        busiest_bytes: Int, those bytes, of tensors whose size is known while tracing.
    """

    batch_size: int
    loss_on: str
    why_merged: str
    may_divide: bool
    merge_device: str
    towers: tuple[TowerTimes, ...]
    starting: float
    sharding: float
    weights_out: float
    together: float
    merging: float
    update: float
    step: float
    template: float
    whole_batch: float
    reading: float | None = None
    eager: bool = False
    homes: dict[str, int] = dataclasses.field(default_factory=dict)
    busiest: str = ""
    busiest_bytes: int = 0

    @property
    def speed_up(self) -> float:
        """The bare template's step time divided by that of the parallel model."""
        return self.template / self.step

    @property
    def efficiency(self) -> float:
        """The speed-up divided by the number of devices; 1 is perfect."""
        return self.speed_up / len(self.towers)

    @property
    def least_bytes(self) -> float:
        """The bytes that each of N devices receives at least: 2(N-1)/N of the weights.

        So much an all-reduce receives, and so much a device that has its share of the weights.
        """
        count = len(self.towers)
        return 2 * (count - 1) / count * sum(self.homes.values())

    @property
    def waiting(self) -> float:
        """Milliseconds that the first tower to be done waits for the last."""
        return max(tower.waiting for tower in self.towers)
