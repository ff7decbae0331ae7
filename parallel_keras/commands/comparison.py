"""What the demo found: one device beside all of them."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from parallel_keras.commands import CommandError

# Both runs do the same sums, but in another order: one adds up the gradients of 128 images, the
# other those of each share and then the shares. In float32 that moves a weight by about 1e-8 in a
# step, and the following steps amplify it.
WEIGHT_TOLERANCE: Final = 1e-5
LOSS_TOLERANCE: Final = 1e-5

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """Loss and accuracy of a network on some images."""

    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of one training."""

    losses: list[float]
    seconds: list[float]
    weights: list[Array]
    train: Score
    test: Score

    @property
    def seconds_per_epoch(self) -> float:
        """The median without the first epoch, which also traces the step and warms up."""
        return statistics.median(self.seconds[1:])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs, and what became of the file that was saved.

    Attributes:
        devices: The devices of the second run.
        one: The run on one device.
        every: The run on all of them.
        alone: The score of the file in a process without this library.
    """

    devices: tuple[str, ...]
    one: Run
    every: Run
    alone: Score

    @property
    def weight_difference(self) -> float:
        """The largest difference of two weights."""
        return max(
            float(np.max(np.abs(ours - theirs)))
            for ours, theirs in zip(self.one.weights, self.every.weights, strict=True)
        )

    @property
    def loss_difference(self) -> float:
        """The largest difference of two losses, relative to that on one device."""
        losses = [(*run.losses, run.train.loss, run.test.loss) for run in (self.one, self.every)]
        return max(abs(ours / theirs - 1) for theirs, ours in zip(*losses, strict=True))

    def __str__(self) -> str:
        """A table."""
        one, every = self.one, self.every
        rows = [
            ("", "one device", f"{len(self.devices)} device(s)"),
            ("loss, train", f"{one.train.loss:.6f}", f"{every.train.loss:.6f}"),
            ("loss, test", f"{one.test.loss:.6f}", f"{every.test.loss:.6f}"),
            ("accuracy, train", f"{one.train.accuracy:.4f}", f"{every.train.accuracy:.4f}"),
            ("accuracy, test", f"{one.test.accuracy:.4f}", f"{every.test.accuracy:.4f}"),
            ("seconds per epoch", f"{one.seconds_per_epoch:.2f}", f"{every.seconds_per_epoch:.2f}"),
        ]
        lines = [f"{name:<20}{left:>14}{right:>14}" for name, left, right in rows]
        return "\n".join(
            [
                *lines,
                "",
                f"Largest weight difference: {self.weight_difference:.1e} "
                f"(allowed: {WEIGHT_TOLERANCE:.0e})",
                f"Largest loss difference:   {self.loss_difference:.1e}, relative "
                f"(allowed: {LOSS_TOLERANCE:.0e})",
                f"Speed-up:                  {self.speed_up:.2f} "
                "(the median seconds per epoch after its first step, without the first epoch)",
                "The saved file, in a process without parallel_keras: "
                f"test loss {self.alone.loss:.6f}, test accuracy {self.alone.accuracy:.4f}",
            ]
        )

    @property
    def speed_up(self) -> float:
        """The time per epoch on one device, divided by that on all."""
        return self.one.seconds_per_epoch / self.every.seconds_per_epoch

    def as_dict(self) -> dict[str, Any]:
        """What was found, for JSON."""

        def describe(run: Run) -> dict[str, Any]:
            return {
                "train": dataclasses.asdict(run.train),
                "test": dataclasses.asdict(run.test),
                "seconds_per_epoch": run.seconds_per_epoch,
            }

        return {
            "devices": list(self.devices),
            "one_device": describe(self.one),
            "all_devices": describe(self.every),
            "saved_file": dataclasses.asdict(self.alone),
            "weight_difference": self.weight_difference,
            "loss_difference": self.loss_difference,
            "speed_up": self.speed_up,
        }

    def draw(self, path: Path) -> None:
        """Draws the losses and the times.

        Args:
            path: Where to.
        """
        from matplotlib import figure, ticker

        one, every = self.one, self.every

        # A Figure of its own, not pyplot: that needs no display, and leaves no global state behind.
        drawing = figure.Figure(figsize=(9, 4), layout="constrained")
        losses, times = drawing.subplots(1, 2, width_ratios=(3, 2))
        epochs = range(1, len(one.losses) + 1)
        names = ("one device", f"{len(self.devices)} device(s)")

        # The curves coincide: only with a broad one below can both be seen.
        losses.plot(epochs, one.losses, color="C0", linewidth=6, alpha=0.4, label=names[0])
        losses.plot(epochs, every.losses, color="C1", linewidth=1.5, label=names[1])
        losses.set(title="Training loss", xlabel="Epoch", yscale="log")
        losses.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        losses.grid(alpha=0.3)
        losses.legend()

        seconds = (one.seconds_per_epoch, every.seconds_per_epoch)
        bars = times.bar(names, seconds, color=("C0", "C1"), alpha=0.8, width=0.6)
        times.bar_label(bars, fmt="%.2f s", padding=2)
        times.margins(y=0.12)
        times.set(
            title=f"Time per epoch: {self.speed_up:.2f} times as fast",
            ylabel="Seconds (median, without the first epoch)",
        )
        drawing.savefig(path, dpi=150)

    def check(self) -> None:
        """Raises a `CommandError` if something that the demo shows does not hold."""
        if (difference := self.weight_difference) > WEIGHT_TOLERANCE:
            raise CommandError(
                "The weights differ by more than rounding. "
                f"Expected: at most {WEIGHT_TOLERANCE:.0e}. Received: difference={difference:.1e}. "
                "Please report this, with your versions of Keras and TensorFlow."
            )
        if (difference := self.loss_difference) > LOSS_TOLERANCE:
            raise CommandError(
                "The losses differ by more than rounding. "
                f"Expected: at most {LOSS_TOLERANCE:.0e}. Received: difference={difference:.1e}. "
                "Please report this, with your versions of Keras and TensorFlow."
            )
        if (difference := abs(self.alone.loss / self.every.test.loss - 1)) > LOSS_TOLERANCE:
            raise CommandError(
                "The saved file is not the network that was saved: its test loss is another. "
                f"Expected: {self.every.test.loss:.6f}. Received: loss={self.alone.loss:.6f}. "
                "Please report this, with your versions of Keras and TensorFlow."
            )
        if self.every.losses[-1] >= self.every.losses[0]:
            raise CommandError(
                "The network has learnt nothing: its loss did not fall. "
                f"Expected: less than {self.every.losses[0]:.6f}, that of the first epoch. "
                f"Received: loss={self.every.losses[-1]:.6f} in the last. "
                "Please report this, with your versions of Keras and TensorFlow."
            )
