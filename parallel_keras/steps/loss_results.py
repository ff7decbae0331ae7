"""What towers return from a step with the loss on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from parallel_keras.shard import Shards
from parallel_keras.workers.message import Message

if TYPE_CHECKING:
    from parallel_keras.towers.results import Updates


class LossResult(NamedTuple):
    """What one tower returns from a step.

    Attributes:
        loss: Its part of the loss of the whole batch.
        trackers: The mean losses of single outputs over its rows.
        gradients: Those of its part of the loss.
        counts: How far the variables of compiled losses and metrics came, from zero.
        outputs: The model's outputs, or `None` if the towers count.
        state: What was assigned and depends on the shard.
        constant: What was assigned and does not.
    """

    loss: tf.Tensor
    trackers: list[tf.Tensor]
    gradients: list[Any]
    counts: list[tf.Tensor]
    outputs: Any
    state: Updates
    constant: Updates

    def changed(self, **fields: Any) -> LossResult:
        """The same, with other values in some fields."""
        return self._replace(**fields)

    def message(self) -> Message:
        """What the other workers need of it."""
        state = (self.counts, self.state, self.constant)
        return Message(self.gradients, self.outputs, (self.loss, self.trackers), (), state)

    def received(self, message: Message) -> LossResult:
        """The result of the tower that the message is from."""
        (loss, trackers), (counts, state, constant) = message.numbers, message.state
        return LossResult(
            loss, trackers, message.gradients, counts, message.by_rows, state, constant
        )


class TowerRun(NamedTuple):
    """What the towers were given in a step, and what they returned.

    Attributes:
        shards: The `Shards` of the batch.
        weights: What was read for each of the template's variables.
        scales: The weight of each tower's compiled loss.
        results: What each tower of all workers returned.
    """

    shards: Shards
    weights: list[tf.Tensor]
    scales: list[tf.Tensor]
    results: list[LossResult]
