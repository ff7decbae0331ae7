"""The forward pass of a step whose loss is computed from the merged outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import merge
from parallel_keras.graphs.graph import is_handle
from parallel_keras.shard import Shards
from parallel_keras.steps.penalties import Halved
from parallel_keras.towers.call import Call
from parallel_keras.towers.results import Merged, Pass, assign

if TYPE_CHECKING:
    from parallel_keras.towers.run import Towers


class Recording:
    """The forward pass of one step, whose gradients are taken in two halves.

    A tape records only from the merged outputs to the loss; from there each
    tower goes on back by itself. One tape over everything would put the towers'
    backward passes on one device.

    Args:
        towers: The `Towers`.
        tape: The tape of the merged half, `None` if no gradient will be taken.
        in_parts: Whether outputs may stay in `Parts`. Defaults to `False`.
    """

    def __init__(
        self, towers: Towers, tape: tf.GradientTape | None, *, in_parts: bool = False
    ) -> None:
        self._towers, self._in_parts = towers, in_parts
        self._tape = tape
        self._pass: Pass | None = None
        # One tower goes all the way under the tape of the step, as without this library.
        self.penalties = Halved(towers.homes, None if towers.alone else tape)

    @property
    def is_free(self) -> bool:
        """Whether the step's forward pass is still to come."""
        return self._pass is None

    @property
    def rows(self) -> Any:
        """The rows of the batch."""
        return None if self._pass is None else self._pass.shards.total

    def shard(self, call: Call) -> Shards:
        """Cuts the call."""
        with self._unrecorded():
            return self._towers.shard(call)

    def run(self, shards: Shards, training: Any) -> Pass:
        """Calls the template on all towers, and assigns what they assigned."""
        towers, watch = self._towers, None
        if self._tape is not None and not towers.alone:
            watch = _watch(towers.trainable)
        with self._unrecorded():
            weights = self._read_weights()
            self._pass = towers.forward(shards, weights, training, watch, once=True)
        if self._tape is not None and not towers.alone:
            self._tape.watch(self._pass.parts())
        assign(self._pass.state)
        return self._pass

    def merge(self, results: Pass) -> Merged:
        """Joins what the towers returned, under the tape."""
        return results.merged(in_parts=self._in_parts)

    def gradients(self, loss: tf.Tensor, variables: Sequence[keras.Variable]) -> list[Any]:
        """Gradients of the loss, each added up where its weight lives.

        Args:
            loss: What the merged outputs led to under the tape.
            variables: The variables.

        Returns:
            A list of tensors, `tf.IndexedSlices` or `None`, one for each variable.
        """
        towers, tape = self._towers, self._tape
        values = [variable.value for variable in variables]
        if self._pass is None or tape is None:
            return [None] * len(values)
        if towers.alone:
            with tf.device(towers.devices[0]):
                return tape.gradient(loss, values)
        with tf.device(towers.merge_device):
            sources = [self._pass.parts(), values, self.penalties.values]
            parts, direct, ups = tape.gradient(loss, sources)
        penalties = self.penalties.gradients(ups)
        rows = self._pass.gradients(parts)
        known = [towers.template.variables[index] for index in towers.trainable]
        index_of = {id(variable): index for index, variable in enumerate(known)}
        columns = [_column(rows, index_of.get(id(variable))) for variable in variables]
        columns = towers.workers.add_up(towers.summed(columns, variables))
        found = []
        for variable, column, extra in zip(variables, columns, direct, strict=True):
            with tf.device(towers.homes.of(variable)):
                more = penalties.get(id(variable), [])
                found.append(merge.total([*column, extra, *more]))
        return found

    def _unrecorded(self) -> contextlib.AbstractContextManager[Any]:
        # One tower runs under the tape of the step, as without this library.
        if self._tape is None or self._towers.alone:
            return contextlib.nullcontext()
        return self._tape.stop_recording()

    def _read_weights(self) -> list[tf.Tensor]:
        weights = self._towers.read_weights(tables=True)
        if self._towers.alone and self._tape is not None:
            # It watches by itself only variables that are read as a whole.
            self._tape.watch([weight for weight in weights if is_handle(weight)])
        return weights


def _watch(indices: Sequence[int]) -> Any:
    def watch(copied: list[tf.Tensor], part: Any) -> list[tf.Tensor]:
        del part
        return [copied[index] for index in indices]

    return watch


def _column(towers: Sequence[Sequence[Any]], index: int | None) -> list[Any]:
    return [] if index is None else [tower[index] for tower in towers]
