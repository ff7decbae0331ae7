"""What towers return from a step with the loss on them, and the step as one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.graphs.outputs import whole_outputs
from parallel_keras.shard import Shards
from parallel_keras.workers.message import Message

if TYPE_CHECKING:
    from parallel_keras.steps.loss_on_towers import LossStep
    from parallel_keras.towers.results import State, Updates


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


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A step as one, of what its towers returned.

    Attributes:
        step: The `LossStep`.
        run: The `TowerRun`.
        state: The merged new value of each variable that the model assigned.
    """

    step: LossStep
    run: TowerRun
    state: State

    @property
    def rows(self) -> Any:
        """The rows of the batch."""
        return self.run.shards.total

    def loss(self) -> tf.Tensor:
        """The loss of the whole batch, without weight regularisers."""
        return tf.add_n([result.loss for result in self.run.results])

    def gradients(self) -> list[Any]:
        """The gradients of `loss()`, one for each trainable weight, where that lives."""
        columns = list(zip(*[result.gradients for result in self.run.results], strict=True))
        homes, weights = self.step.towers.homes, self.step.model.trainable_weights
        found = []
        for weight, column in zip(weights, columns, strict=True):
            with tf.device(homes.of(weight)):
                found.append(merge.total(column))
        return found

    def outputs(self) -> Any:
        """The merged outputs; only if the towers do not count."""
        parts, towers = [result.outputs for result in self.run.results], self.step.towers
        given = towers.given(self.run.shards)
        first = towers.workers.first
        here = parts[first : first + len(given.counts)]
        whole = whole_outputs(here, towers.rules, given) if len(parts) > 1 else ()
        return merge.outputs(parts, self.run.shards, towers.rules, whole)

    def update_counters(self) -> None:
        """Adds what the towers counted to compiled metrics and loss trackers."""
        model, results = self.step.model, self.run.results
        for tracker, *values in zip(
            _compat.loss_trackers(model), *[result.trackers for result in results], strict=True
        ):
            pairs = zip(values, self.run.scales, strict=True)
            value = tf.add_n([value * tf.cast(scale, value.dtype) for value, scale in pairs])
            # Keras weights this mean by the batch size where it is known while tracing.
            weight = self.rows if isinstance(self.rows, int) else None
            tracker.update_state(value, sample_weight=weight)
        if not self.step.count:
            return
        trackers = {id(v) for m in _compat.loss_trackers(model) for v in m.variables}
        counts = zip(*[result.counts for result in results], strict=True)
        for counter, added in zip(self.step.counters(), counts, strict=True):
            if id(counter) not in trackers:
                counter.assign_add(merge.live_sum(added, self.run.shards.shares()))
