"""Runs the towers so that gradients can flow back to them, on their devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.towers.graph import is_handle
from parallel_keras.towers.results import Call, Merged, Pass, floats
from parallel_keras.towers.run import Towers
from parallel_keras.towers.state import fingerprint


class Recording:
    """The forward pass of one step, whose gradients are taken in two halves.

    A tape records only from the merged outputs to the loss; from there each
    tower goes on back by itself. One tape over everything would put the towers'
    backward passes on one device.

    Args:
        towers: The `Towers`.
        tape: The tape of the merged half, `None` if no gradient will be taken.
    """

    def __init__(self, towers: Towers, tape: tf.GradientTape | None) -> None:
        self._towers = towers
        self._tape = tape
        self._alone = towers.workers.towers == 1
        self._pass: Pass | None = None

    @property
    def is_free(self) -> bool:
        """Whether the step's forward pass is still to come."""
        return self._pass is None

    @property
    def rows(self) -> Any:
        """The rows of the batch."""
        return None if self._pass is None else self._pass.shards.total

    def run(self, call: Call, training: Any) -> Merged:
        """Runs the forward pass."""
        towers, tape = self._towers, self._tape
        if self._alone:
            self._pass = towers.forward(towers.cut(call), self._read_weights(), training)
            _assign(self._pass)
            return self._pass.merged()
        with contextlib.nullcontext() if tape is None else tape.stop_recording():
            watch = None if tape is None else _watch_weights(towers)
            shards, weights = towers.cut(call), self._read_weights()
            self._pass = towers.forward(shards, weights, training, watch)
        if tape is not None:
            tape.watch(self._pass.parts())
        _assign(self._pass)
        return self._pass.merged()

    def gradients(self, loss: tf.Tensor, variables: Sequence[keras.Variable]) -> list[Any]:
        """Gradients of the loss, merged on the merge device.

        Args:
            loss: What the merged outputs led to under the tape.
            variables: The variables.

        Returns:
            A list of tensors, `tf.IndexedSlices` or `None`, one for each variable.
        """
        own = [variable.value for variable in variables]
        if self._pass is None or self._tape is None:
            return [None] * len(own)
        if self._alone:
            with tf.device(self._towers.devices[0]):
                return self._tape.gradient(loss, own)
        with tf.device(self._towers.merge_device):
            parts, direct = self._tape.gradient(loss, [self._pass.parts(), own])
        towers = self._pass.gradients(parts)
        index_of = {id(v): i for i, v in enumerate(_trainable(self._towers))}
        with tf.device(self._towers.merge_device):
            columns = [_column(towers, index_of.get(id(variable))) for variable in variables]
            return [
                merge.total([*column, gradient])
                for column, gradient in zip(
                    self._towers.workers.add_up(columns), direct, strict=True
                )
            ]

    def _read_weights(self) -> list[tf.Tensor]:
        weights = self._towers.read_weights(tables=True)
        if self._alone and self._tape is not None:
            # It watches by itself only variables that are read as a whole.
            self._tape.watch([weight for weight in weights if is_handle(weight)])
        return weights


class Runner:
    """Runs one call on all towers, as the moment asks for.

    Args:
        towers: The `Towers`.
        eager: Whether nothing is traced.
    """

    def __init__(self, towers: Towers, *, eager: bool = False) -> None:
        self._towers = towers
        self._eager = eager
        self._recording: Recording | None = None
        self._function: Any = None
        self._traced_for: tuple[Any, ...] = ()

    def __call__(self, call: Call, training: Any) -> Merged:
        """What the towers return as one; what layers assigned is assigned."""
        if self._recording is not None and self._recording.is_free:
            return self._recording.run(call, training)
        if tf.executing_eagerly() and not self._eager and not _compat.in_stateless_scope():
            return self._as_function()(call, training)
        return self._differentiable(call, training)

    def _as_function(self) -> Any:
        """The call as a graph: outside of one, towers would run one after the other."""
        found = fingerprint(self._towers.template)
        if self._function is None or found != self._traced_for:
            self._traced_for = found
            self._function = tf.function(
                self._differentiable, autograph=False, reduce_retracing=True
            )
        return self._function

    @contextlib.contextmanager
    def record(self, tape: tf.GradientTape | None) -> Iterator[Recording]:
        """The first call inside is the step's forward pass, see `Recording`."""
        outer, self._recording = self._recording, Recording(self._towers, tape)
        try:
            yield self._recording
        finally:
            self._recording = outer

    def _differentiable(self, call: Call, training: Any) -> Merged:
        """A call that any tape can differentiate, to any order."""
        return _Differentiable(self._towers, call, training).run()


class _Differentiable:
    """One call as a function with a gradient of its own.

    The gradient TensorFlow would make runs the towers' backward passes on one
    device. This one runs each on its own.
    """

    def __init__(self, towers: Towers, call: Call, training: Any) -> None:
        self._towers, self._call, self._training = towers, call, training
        self._weights = towers.read_weights()
        self._trainable = _trainable_indices(towers)
        self._inputs = tf.nest.flatten(call, expand_composites=True)
        self._float_inputs = [
            index
            for index, leaf in enumerate(self._inputs)
            if tf.is_tensor(leaf) and leaf.dtype.is_floating
        ]

    def run(self) -> Merged:
        shared = self._towers.workers.shared
        sources = [
            *shared([self._weights[index] for index in self._trainable]),
            *(shared([self._inputs[index]])[0] for index in self._float_inputs),
        ]
        results: dict[str, Any] = {}

        @tf.custom_gradient
        def forward(*values: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            pass_, cutting, joining, merged = self._run(values)
            flat = floats(merged)
            results["pass"], results["merged"] = pass_, merged

            def gradient(*upstream: Any, variables: Any = None) -> Any:
                own = self._gradients(pass_, cutting, joining, flat, upstream, values)
                return (own, [None] * len(variables)) if variables else own

            return flat, gradient

        flat = forward(*sources)
        _assign(results["pass"])
        return Merged(*_with_floats(tuple(results["merged"]), flat))

    def _run(self, values: Sequence[tf.Tensor]) -> tuple[Pass, Any, Any, Merged]:
        weights, inputs = list(self._weights), list(self._inputs)
        for index, value in zip(self._trainable, values, strict=False):
            weights[index] = value
        for index, value in zip(self._float_inputs, values[len(self._trainable) :], strict=True):
            inputs[index] = value
        call = tf.nest.pack_sequence_as(self._call, inputs, expand_composites=True)
        with tf.GradientTape(persistent=True) as cutting:
            cutting.watch(values[len(self._trainable) :])
            shards = self._towers.cut(call)

        def watch(own: list[tf.Tensor], part: Any) -> list[tf.Tensor]:
            return [*(own[index] for index in self._trainable), *floats(part)]

        pass_ = self._towers.forward(shards, weights, self._training, watch)
        with tf.GradientTape(persistent=True) as joining:
            joining.watch(pass_.parts())
            merged = pass_.merged()
        return pass_, cutting, joining, merged

    def _gradients(
        self,
        pass_: Pass,
        cutting: tf.GradientTape,
        joining: tf.GradientTape,
        flat: list[tf.Tensor],
        upstream: Sequence[Any],
        values: Sequence[tf.Tensor],
    ) -> list[Any]:
        device = self._towers.merge_device
        with tf.device(device):
            ups = joining.gradient(flat, pass_.parts(), output_gradients=list(upstream))
        towers = pass_.gradients(ups)
        count = len(self._trainable)
        with tf.device(device):
            weights = [merge.total(_column(towers, index)) for index in range(count)]
            parts = [leaf for part in pass_.shards.parts for leaf in floats(part)]
            part_gradients = [gradient for tower in towers for gradient in tower[count:]]
            reached = [
                pair for pair in zip(parts, part_gradients, strict=True) if pair[1] is not None
            ]
            inputs: list[Any] = [None] * (len(values) - count)
            if reached and inputs:
                targets, ups = zip(*reached, strict=True)
                inputs = cutting.gradient(
                    list(targets), list(values[count:]), output_gradients=list(ups)
                )
        return [*weights, *inputs]


def _trainable_indices(towers: Towers) -> list[int]:
    return [
        index
        for index, variable in enumerate(towers.template.variables)
        if variable.trainable and tf.as_dtype(variable.dtype).is_floating
    ]


def _trainable(towers: Towers) -> list[keras.Variable]:
    variables = towers.template.variables
    return [variables[index] for index in _trainable_indices(towers)]


def _watch_weights(towers: Towers) -> Any:
    indices = _trainable_indices(towers)

    def watch(own: list[tf.Tensor], part: Any) -> list[tf.Tensor]:
        del part
        return [own[index] for index in indices]

    return watch


def _column(towers: Sequence[Sequence[Any]], index: int | None) -> list[Any]:
    return [] if index is None else [tower[index] for tower in towers]


def _assign(pass_: Pass) -> None:
    for variable, value in pass_.state:
        variable.assign(value)


def _with_floats(nest: Any, values: Sequence[tf.Tensor]) -> Any:
    """The nest with its float tensors replaced, in the order of `floats`."""
    replacements = iter(values)
    flat = [
        next(replacements) if tf.is_tensor(leaf) and leaf.dtype.is_floating else leaf
        for leaf in tf.nest.flatten(nest, expand_composites=True)
    ]
    return tf.nest.pack_sequence_as(nest, flat, expand_composites=True)
