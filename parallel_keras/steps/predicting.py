"""Runs of `predict`: what the towers return stays in parts until the host needs it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from parallel_keras.parts import Parts, as_tensor, joined
from parallel_keras.steps.overriding import overrides


class _Array(np.ndarray[Any, Any]):
    """An array that Keras reads as it reads tensors."""

    def numpy(self) -> np.ndarray[Any, Any]:
        return self


_HOOKS = tuple(f"on_predict_{when}" for when in ("begin", "batch_begin", "batch_end", "end"))
# No tensor: making one takes time, and it would not outlive TensorFlow's runtime.
_NO_ROWS = np.empty(0).view(_Array)


class Run:
    """One run of `predict`, or one batch of `predict_on_batch`.

    Keras gets no rows of what is in parts, so it does not join them either.
    """

    def __init__(self) -> None:
        # By the number of a leaf; all batches of one go the way of the first.
        self._columns: dict[int, list[Parts]] | None = None

    def keep(self, outputs: Any) -> Any:
        """Keeps what is in parts.

        Args:
            outputs: What a predict function returned for a batch.

        Returns:
            The same for Keras.
        """
        leaves = keras.tree.flatten(outputs)
        if self._columns is None:
            self._columns = {i: [] for i, leaf in enumerate(leaves) if isinstance(leaf, Parts)}
        for index, leaf in enumerate(leaves):
            if index in self._columns:
                self._columns[index].append(leaf if isinstance(leaf, Parts) else Parts((leaf,)))
                leaves[index] = _NO_ROWS
            else:
                leaves[index] = as_tensor(leaf)
        return keras.tree.pack_sequence_as(outputs, leaves)

    def joined(self, outputs: Any) -> Any:
        """What Keras made of all batches, with what was kept.

        Args:
            outputs: The outputs for all rows, without rows where they were kept.
        """
        if not self._columns:
            return outputs
        leaves = keras.tree.flatten(outputs)
        for index, column in self._columns.items():
            leaves[index] = joined(column)
        return keras.tree.pack_sequence_as(outputs, leaves)


class Predicting(threading.local):
    """Who predicts in this thread.

    Attributes:
        in_parts: Whether a predict function runs or is traced that can return parts.
        run: The run that it is part of; `None` if whoever calls it is to get tensors.
    """

    in_parts = False
    run: Run | None = None

    @contextlib.contextmanager
    def running(self, callbacks: Any = None) -> Iterator[Run]:
        """Inside, a predict function leaves its outputs to the run.

        Args:
            callbacks: Those of the run: one that may read the outputs, or that may call the
                function itself, gets them from Keras.
        """
        run, outer = Run(), self.run
        readers = any(map(_takes_part, keras.tree.flatten(callbacks)))
        self.run = None if readers else run
        try:
            yield run
        finally:
            self.run = outer

    def function(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A predict function whose step may return outputs in parts.

        Args:
            step: What Keras made: takes batches, and returns the outputs.

        Returns:
            A function like the one given.
        """

        def predict(data: Any) -> Any:
            outer, self.in_parts = self.in_parts, True
            try:
                outputs = step(data)
            finally:
                self.in_parts = outer
            if self.run is not None:
                return self.run.keep(outputs)
            return keras.tree.map_structure(as_tensor, outputs)

        return predict


def _takes_part(callback: Any) -> bool:
    if callback is None:
        return False
    base = keras.callbacks.Callback
    return not isinstance(callback, base) or bool(overrides(callback, _HOOKS, base))
