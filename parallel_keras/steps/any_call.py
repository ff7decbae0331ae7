"""Any call of a model, with gradients to any order, each tower's taken on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from parallel_keras import _compat, merge, slices
from parallel_keras.nests import flatten, floats, is_float, replaced
from parallel_keras.shard import Shards
from parallel_keras.towers.call import Call
from parallel_keras.towers.results import Merged, Pass, assign

if TYPE_CHECKING:
    from parallel_keras.towers.run import Towers


class DifferentiablePass:
    """A forward pass as a function with a gradient of its own.

    The gradient TensorFlow would make runs the towers' backward passes on one
    device. This one runs each on its own.

    Args:
        towers: The `Towers`.
        once: Whether gradients are taken once at most, and not of gradients; `None` to ask
            the tapes that record now. Defaults to `None`.
    """

    def __init__(self, towers: Towers, *, once: bool | None = None) -> None:
        self._towers = towers
        self._once = once
        self._trainable = towers.trainable
        self._weights = towers.read_weights()
        # Gradients flow through these from the merged outputs to the towers', and from
        # the parts of the batch to the batch.
        self._joining = tf.GradientTape(persistent=True)
        self._cutting = tf.GradientTape(persistent=True)
        self._inputs: list[tf.Tensor] = []
        self._pass: Pass | None = None

    def shard(self, call: Call) -> Shards:
        """Cuts the call, so that gradients find the way to the batch."""
        with self._cutting:
            self._cutting.watch(self._inputs)
            return self._towers.shard(call)

    def run(self, shards: Shards, training: Any) -> Pass:
        """Calls the template on all towers."""

        def watch(copied: list[tf.Tensor], part: Any) -> list[tf.Tensor]:
            return [*(copied[index] for index in self._trainable), *floats(part)]

        once = bool(self._once)
        self._pass = self._towers.forward(shards, self._weights, training, watch, once=once)
        return self._pass

    def merge(self, results: Pass) -> Merged:
        """Joins what the towers returned, so that gradients find the way to each tower."""
        with self._joining:
            self._joining.watch(results.parts())
            return results.merged()

    def differentiate(
        self, flow: Callable[[DifferentiablePass, Call], Merged], call: Call
    ) -> Merged:
        """Runs `flow`, made of the methods above, so that any tape can differentiate it.

        Args:
            flow: Function from this pass and the call to what is merged.
            call: The `Call`.

        Returns:
            The `Merged`. What layers assigned is assigned.
        """
        shared = self._towers.workers.shared
        weights = shared([self._weights[index] for index in self._trainable])
        inputs = [shared([leaf])[0] for leaf in floats(call)]
        if self._once is None:
            self._once = _compat.gradient_order([*weights, *inputs]) == 1
        merged: list[Merged] = []

        @tf.custom_gradient
        def forward(*values: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            if self._once:  # Tapes outside would record the towers too, and so go further.
                values = tuple(tf.stop_gradient(value) for value in values)
            for index, value in zip(self._trainable, values, strict=False):
                self._weights[index] = value
            self._inputs = list(values[len(self._trainable) :])
            leaves = iter(self._inputs)
            flat = [next(leaves) if is_float(leaf) else leaf for leaf in flatten(call)]
            given = tf.nest.pack_sequence_as(call, flat, expand_composites=True)
            merged.append(flow(self, given))
            # A function with a gradient must return something that can have one.
            results = floats(merged[0]) or [tf.zeros(())]

            def gradient(*upstream: Any, variables: Any = None) -> Any:
                others = self._others(variables or ())
                found = self._gradients(results, upstream, others)
                if not variables:
                    return found
                known = dict(zip(map(id, others), found[len(values) :], strict=True))
                # The gradient of a weight goes to its value, which was handed in.
                return found[: len(values)], [known.get(id(variable)) for variable in variables]

            return results, gradient

        results = forward(*weights, *inputs)
        if self._pass is not None:
            assign(self._pass.state)
        return Merged(*replaced(tuple(merged[0]), results, is_float))

    def _others(self, variables: Sequence[tf.Variable]) -> list[tf.Variable]:
        """Those of the variables that are not the template's: Keras does not know them."""
        known = {id(variable.value) for variable in self._towers.template.variables}
        return [variable for variable in variables if id(variable) not in known]

    def _gradients(
        self, results: list[tf.Tensor], upstream: Sequence[Any], others: Sequence[tf.Variable]
    ) -> list[Any]:
        """The gradients of weights, of inputs, and then of variables of others."""
        pass_, device, count = self._pass, self._towers.merge_device, len(self._trainable)
        if pass_ is None:
            return [None] * (count + len(self._inputs) + len(others))
        with tf.device(device):
            ups = self._joining.gradient(results, pass_.parts(), output_gradients=list(upstream))
        towers = pass_.gradients(ups, others)
        variables = [self._towers.template.variables[index] for index in self._trainable]
        columns = self._sparse_added_up(
            [[tower[index] for tower in towers] for index in range(count)]
        )
        weights = []
        for variable, column in zip(
            variables, self._towers.summed(columns, variables), strict=True
        ):
            with tf.device(self._towers.homes.of(variable)):
                weights.append(merge.total(column))
        with tf.device(device):
            parts = [leaf for part in pass_.shards.parts for leaf in floats(part)]
            ups = [
                gradient for tower in towers for gradient in tower[count : len(tower) - len(others)]
            ]
            reached = [pair for pair in zip(parts, ups, strict=True) if pair[1] is not None]
            inputs: list[Any] = [None] * len(self._inputs)
            if reached and inputs:
                targets, ups = zip(*reached, strict=True)
                inputs = self._cutting.gradient(
                    list(targets), self._inputs, output_gradients=list(ups)
                )
            if self._towers.workers.size > 1:
                inputs = [None if found is None else slices.dense(found) for found in inputs]
            found = zip(*[tower[len(tower) - len(others) :] for tower in towers], strict=True)
            summed = [merge.total(column) for column in found]
        return [*weights, *inputs, *summed]

    def _sparse_added_up(self, columns: list[list[Any]]) -> list[list[Any]]:
        """Adds sparse gradients up over all workers, see `AnyWorkers.shared`."""
        sparse = [i for i, column in enumerate(columns) if slices.all_sparse(column)]
        everyone = self._towers.workers.add_up([columns[index] for index in sparse])
        found = dict(zip(sparse, everyone, strict=True))
        return [found.get(index, column) for index, column in enumerate(columns)]


def without_gradient(merged: Merged, error: Exception) -> Merged:
    """What a call gave that cannot be differentiated; who tries nevertheless is told why.

    Args:
        merged: The `Merged`.
        error: What is raised then.
    """

    @tf.custom_gradient
    def forward(*values: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
        def gradient(*upstream: Any, variables: Any = None) -> Any:
            del upstream, variables
            raise error

        return list(values), gradient

    results = floats(merged)
    return Merged(*replaced(tuple(merged), forward(*results), is_float)) if results else merged
