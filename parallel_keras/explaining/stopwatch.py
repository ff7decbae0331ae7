"""Times functions side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def now() -> float:
    """Seconds since some moment; tests put a clock of their own in its place."""
    return time.perf_counter()


class Stopwatch:
    """Times functions of one argument.

    Args:
        data: The argument, where `add` is given no other.
        eager: Bool, whether functions are run as they are, and not as graphs. Defaults to `False`.
    """

    def __init__(self, data: Any, *, eager: bool = False) -> None:
        self._data, self._eager = data, eager
        self._runs: dict[str, Callable[[], Any]] = {}

    def add(
        self, name: str, function: Callable[[Any], Any], data: Any = None, *, jit: bool = False
    ) -> None:
        """Traces a function and runs it twice, to warm up.

        Args:
            name: String, its key in `medians()`.
            function: Function of one argument.
            data: The argument. Defaults to that of the constructor.
            jit: Bool, whether XLA compiles it. Defaults to `False`.
        """
        argument = self._data if data is None else data
        if not self._eager:
            graph = tf.function(function, autograph=False, jit_compile=jit or None)
            # What tf.function itself calls; it would warn that so many are traced.
            function = graph.get_concrete_function(argument)
        self._runs[name] = lambda: function(argument)
        for _ in range(2):
            self._runs[name]()

    def shortest(self, repeats: int) -> dict[str, float]:
        """Runs all functions in turn, so that what else the machine does meets all alike.

        Takes the shortest time of each, because what else the machine does can only add to it
        (see `timeit.Timer.repeat` in Python's documentation).

        Args:
            repeats: Int, how often each is timed.

        Returns:
            Dict from name to milliseconds.
        """
        seconds: dict[str, list[float]] = {name: [] for name in self._runs}
        for _ in range(repeats):
            for name, run in self._runs.items():
                seconds[name].append(_seconds(run))
        return {name: 1000 * min(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], Any]) -> float:
    tf.test.experimental.sync_devices()
    start = now()
    run()
    # GPUs go on working after a call has returned.
    tf.test.experimental.sync_devices()
    return now() - start
