"""Times of steps, and what is made of them."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras


class StepClock(keras.callbacks.Callback):
    """Takes the time at the end of each training step.

    The step has ended when its loss can be read: on a GPU, Keras returns before that.

    Args:
        now: Function that returns seconds. Defaults to `time.perf_counter`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.ends: list[float] = []
        self._now = now

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Called by Keras."""
        del batch
        float((logs or {})["loss"])
        self.ends.append(self._now())

    def seconds(self) -> list[float]:
        """From the end of each step to the end of the next, so one fewer than there were steps."""
        return differences(self.ends)


def differences(times: Sequence[float]) -> list[float]:
    """What lies between one point in time and the next.

    Example:
    >>> differences([1.0, 1.5, 3.5])
    [0.5, 2.0]
    """
    return [after - before for before, after in itertools.pairwise(times)]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it.

    Attributes:
        median: Float.
        low: Float, the lower quartile.
        high: Float, the upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some numbers, of which there is at least one.

        Example:
        >>> Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios of two series that were measured in the same rounds.

    What slows the machine down for a while slows both numbers of a round, so a ratio of the two
    says more than the ratio of two medians.

    Args:
        numerators: One number for each round.
        denominators: The same.

    Returns:
        The `Spread`.

    Example:
    >>> ratios([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    Spread(median=2.0, low=2.0, high=2.1)
    """
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def steps_for(seconds: float, step: float, least: int = 4, most: int = 1000) -> int:
    """How many steps of that length take about so many seconds.

    Example:
    >>> steps_for(1.0, step=0.1), steps_for(1.0, step=10.0), steps_for(1.0, step=1e-6)
    (10, 4, 1000)
    """
    return max(least, min(most, round(seconds / step)))
