"""A training step taken apart, so that its pieces can be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.homes.messages import Copies
from parallel_keras.nests import is_dense
from parallel_keras.shard import Shards
from parallel_keras.steps.loss_on_towers import LossStep, NeedsWholeBatch
from parallel_keras.towers import losses
from parallel_keras.towers.call import as_call
from parallel_keras.towers.results import Pass
from parallel_keras.towers.run import Towers
from parallel_keras.workers.alone import Alone

if TYPE_CHECKING:
    from parallel_keras.model import DataParallelModel

Data = tuple[Any, Any, Any]
Piece = Callable[[Data], Any]


class Pieces:
    """The step up to each of its pieces, made of what the step itself is made of.

    What comes next includes what came before, so the difference of two is one piece, and all
    pieces together are the step.

    Args:
        parallel: The compiled model, built.
        data: Inputs, targets and sample weights of one batch.
    """

    def __init__(self, parallel: DataParallelModel, data: Data) -> None:
        self.parallel = parallel
        # Towers of its own: what is traced here stays out of the model.
        self.towers = self._make_towers(parallel.devices)
        self._alone = self._make_towers(parallel.devices[:1])
        self.divided = self._finds_out_whether_divided(data)

    def up_to(self) -> dict[str, Piece]:
        """The step, cut off after each of its pieces, in order."""
        pieces: dict[str, Piece] = {
            "start": lambda _: (),
            "sharding": self._sharding,
            "weights out": self._weights_out,
        }
        if self.divided:
            pieces["towers"] = lambda data: self._run(self.towers, data).run.results
            pieces["merging"] = self._merging
        else:
            pieces["towers"] = lambda data: self._forward(data).results
            pieces["merging outputs"] = self._loss_of_outputs
            pieces["backward"] = self._backward
            pieces["merging"] = self._merged_gradients
        ends = {name: _ending(piece) for name, piece in pieces.items()}
        return {**ends, "step": self.parallel.train_step}

    def alone(self, device: str) -> dict[str, Piece]:
        """What one tower does, up to each of its pieces, as if there were no others.

        Args:
            device: String, its name.
        """
        alone = self._alone.on(device)
        return {
            "weights out": _ending(lambda _: self._copies(alone)),
            "forward": _ending(lambda data: self._forward(data, alone).results),
            "backward": _ending(lambda data: self._forward_and_backward(data, alone)),
        }

    def template_step(self, data: Data) -> Any:
        """The step of the bare template, on the first device."""
        with tf.device(self.parallel.devices[0]):
            return self.parallel.template.train_step(data)

    def graph(self, data: Data) -> Any:
        """The graph of the whole step."""
        step = tf.function(self.parallel.train_step, autograph=False)
        return step.get_concrete_function(data).graph

    def shards(self, data: Data) -> Shards:
        """The batch, cut."""
        x, y, sample_weight = data
        return self.towers.shard(
            {"call": as_call((x,), {}, None), "y": y, "weights": sample_weight}
        )

    def _make_towers(self, devices: tuple[str, ...]) -> Towers:
        parallel = self.parallel
        rules = parallel.request["rules"]
        return Towers(
            parallel.template,
            devices,
            parallel.merge_device,
            rules,
            Alone(len(devices)),
            parallel.homes,
            jit=parallel.template.jit_compile,
            eager=parallel.run_eagerly,
        )

    def _finds_out_whether_divided(self, data: Data) -> bool:
        if self.parallel.loss_path.reduction is None or not is_dense(data):
            return False

        def results() -> Any:
            return self._run(self.towers, data).run.results

        try:
            tf.function(results, autograph=False).get_concrete_function()
        except NeedsWholeBatch:
            return False
        return True

    def _run(self, towers: Towers, data: Data) -> Any:
        parallel = self.parallel
        count = all(map(losses.is_additive, _compat.compiled_metrics(parallel)))
        step = LossStep(towers, parallel, parallel.loss_path.reduction or "mean", count, True)
        return step.merge(step.run(step.shard(data)))

    def _sharding(self, data: Data) -> Any:
        parts = []
        for device, part in zip(self.towers.devices, self.shards(data).parts, strict=False):
            with tf.device(device):
                parts.append(tf.nest.map_structure(tf.identity, _tensors(part)))
        return parts

    def _copies(self, towers: Towers) -> Any:
        homes = [towers.homes.of(variable) for variable in towers.template.variables]
        copies = Copies(towers.read_weights(tables=True), homes)
        return [copies.values_at(device) for device in towers.devices]

    def _weights_out(self, data: Data) -> Any:
        return self._sharding(data), self._copies(self.towers)

    def _forward(self, data: Data, towers: Towers | None = None) -> Pass:
        towers = towers or self.towers
        shards = towers.shard(as_call((data[0],), {}, None))
        wanted = {id(variable) for variable in self.parallel.trainable_weights}
        variables = self.parallel.template.variables

        def watch(copied: list[tf.Tensor], part: Any) -> list[tf.Tensor]:
            del part
            pairs = zip(variables, copied, strict=True)
            return [weight for variable, weight in pairs if id(variable) in wanted]

        return towers.forward(shards, towers.read_weights(tables=True), True, watch)

    def _forward_and_backward(self, data: Data, towers: Towers) -> Any:
        if self.divided:
            return self._run(towers, data).run.results
        alone = self._forward(data, towers)
        return alone.gradients([[tf.ones_like(part) for part in alone.parts()[0]]])

    def _loss_of_outputs(self, data: Data) -> Any:
        return self._upstream(self._forward(data), data)

    def _upstream(self, forward: Pass, data: Data) -> Any:
        """The gradients of the loss of the whole batch, back on the towers' devices."""
        _, y, sample_weight = data
        with tf.GradientTape() as tape, tf.device(self.parallel.merge_device):
            tape.watch(forward.parts())
            merged = forward.merged()
            terms = [tf.cast(term, tf.float32) for term in keras.tree.flatten(merged.terms)]
            loss = tf.add_n([tf.zeros(()), *terms])
            if self.parallel.loss is not None:
                data_loss = _compat.data_loss(
                    self.parallel, y, merged.attached(self.parallel.template), sample_weight
                )
                loss += tf.cast(data_loss, tf.float32)
        with tf.device(self.parallel.merge_device):
            return tape.gradient(loss, forward.parts())

    def _backward(self, data: Data) -> list[list[Any]]:
        forward = self._forward(data)
        return forward.gradients(self._upstream(forward, data))

    def _merged_gradients(self, data: Data) -> list[Any]:
        columns = [list(column) for column in zip(*self._backward(data), strict=True)]
        summed = self.towers.summed(columns, self.parallel.trainable_weights)
        with tf.device(self.parallel.merge_device):
            return [merge.total(column) for column in summed]

    def _merging(self, data: Data) -> Any:
        result = self._run(self.towers, data)
        with tf.device(self.parallel.merge_device):
            result.update_counters()
            outputs = None if result.step.count else result.outputs()
            return result.gradients(), result.loss(), outputs, [v for _, v in result.state]


def _tensors(nest: Any) -> list[tf.Tensor]:
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [leaf for leaf in leaves if tf.is_tensor(leaf)]


def _ending(piece: Piece) -> Piece:
    """The piece, with one number as its result.

    To hand many tensors over to Python takes longer than a small piece. The number needs a little
    of each tensor on the device where it is, so TensorFlow cannot leave any of them out.
    """

    def ends(data: Data) -> tf.Tensor:
        little = [tf.zeros([1])]
        for tensor in _tensors(piece(data)):
            with tf.device(tensor.device):
                first = tf.reshape(tensor, [-1])[:1]
                is_text = tensor.dtype == tf.string
                little.append(tf.cast(tf.size(first) if is_text else first, tf.float32))
        return tf.reduce_sum(tf.concat([tf.reshape(each, [-1]) for each in little], axis=0))

    return ends
