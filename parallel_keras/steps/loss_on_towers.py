"""The step in which each tower computes its part of the loss and its gradients.

Outputs never leave their device: over the merge device go gradients, a few
scalars and the metrics' counts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.shard import Shards
from parallel_keras.towers.collectives import talking_to
from parallel_keras.towers.graph import hide_value
from parallel_keras.towers.losses import term_rule
from parallel_keras.towers.results import as_call
from parallel_keras.towers.run import Towers


class NeedsWholeBatch(Exception):  # noqa: N818 (it asks for the other path, it is not an error)
    """The loss turned out, while tracing, not to be a sum over rows."""


@dataclasses.dataclass(frozen=True)
class LossStep:
    """A forward pass, loss and gradients on each tower.

    Args:
        towers: The `Towers`.
        model: The compiled model whose losses and metrics are meant.
        reduction: `"mean"` or `"sum"`, how the towers' losses add up.
        count: Whether the towers update the compiled metrics too; if not, they
            return their outputs.
    """

    towers: Towers
    model: keras.Model
    reduction: str
    count: bool

    def run(self, data: tuple[Any, Any, Any], *, training: bool, loss_scale: Any) -> StepResult:
        """Runs the step.

        Args:
            data: Inputs, targets and sample weights (or `None`) of the batch.
            training: Whether gradients are computed.
            loss_scale: Scalar that the loss is multiplied by before gradients
                are taken, or `None`.

        Returns:
            The `StepResult`.

        Raises:
            NeedsWholeBatch: While tracing, if outputs have masks or no row axis:
                then the loss of the batch is not the mean of those of the shards.
        """
        x, y, sample_weight = data
        call = as_call((x,), {}, None)
        shards = self.towers.cut({"call": call, "y": y, "weights": sample_weight}, own=self.count)
        weights = self.towers.read_weights(tables=True)
        with tf.device(self.towers.merge_device):
            shares = [hide_value(share) for share in shards.shares()]
            # A tower that only stands in must not add to a sum either.
            signs = [tf.sign(share) for share in shares]
        scales = signs if self.reduction == "sum" else shares
        first = self.towers.workers.first
        numbers = iter([*zip(scales, shares, strict=True)][first:])

        def run(body: Any, own: list[tf.Tensor], *rest: Any) -> Any:
            return body(own, *rest, next(numbers), loss_scale, training)

        # Kept as calls, towers start and run faster: nothing of theirs is needed outside.
        results = self.towers.on_each(self.on_tower, shards, weights, run, inline=False)
        results = self.towers.workers.join(results, "train" if training else "test", shards)
        state = self.towers.merge_state(results, weights, shards)
        return StepResult(self, shards, results, scales, state)

    def on_tower(
        self,
        weights: list[tf.Tensor],
        tower: tf.Tensor | None,
        peers: Any,
        part: dict[str, Any],
        scales: tuple[tf.Tensor, tf.Tensor],
        loss_scale: tf.Tensor | None,
        training: bool,
    ) -> dict[str, Any]:
        """The tower function of this step: nothing outside of it is changed."""
        counters = self.counters()
        zeros = [tf.zeros(counter.shape, counter.dtype) for counter in counters]
        scope = self.towers.scope(weights, tower, counters, zeros)
        sources = self._sources(weights) if training else []
        tape = tf.GradientTape(watch_accessed_variables=False)
        with scope, talking_to(peers), tape:
            tape.watch(sources)
            y_pred = self.towers.call_template(scope, part["call"], training)
            _check_rows(y_pred)
            own = _compat.data_loss(self.model, part["y"], y_pred, part["weights"])
            loss = self._weighted(own, scope.terms, *scales)
        up = None if loss_scale is None else tf.cast(loss_scale, loss.dtype)
        gradients = tape.gradient(loss, sources, output_gradients=up) if sources else []
        with scope, talking_to(peers):
            losses = [tracker.result() for tracker in _compat.loss_trackers(self.model)]
            if self.count:
                _compat.update_metrics(self.model, part["y"], y_pred, part["weights"])
        varying, constant = self.towers.updates(scope, (part, tower), ignore=counters)
        return {
            "loss": loss,
            "losses": losses,
            "gradients": gradients,
            "counts": [scope.latest(counter) for counter in counters],
            "outputs": None if self.count else y_pred,
            "state": varying,
            "constant": constant,
        }

    def counters(self) -> list[keras.Variable]:
        """The variables of compiled losses and metrics; each tower starts them at zero."""
        metrics = [*_compat.loss_trackers(self.model), *_compat.compiled_metrics(self.model)]
        return [variable for metric in metrics for variable in metric.variables]

    def _sources(self, weights: list[tf.Tensor]) -> list[tf.Tensor]:
        variables = self.towers.template.variables
        value_of = {id(v): value for v, value in zip(variables, weights, strict=True)}
        return [value_of[id(variable)] for variable in self.model.trainable_weights]

    def _weighted(
        self,
        own: tf.Tensor,
        terms: dict[str, list[tf.Tensor]],
        scale: tf.Tensor,
        share: tf.Tensor,
    ) -> tf.Tensor:
        """This tower's part of the loss of the whole batch."""
        loss = own * tf.cast(scale, own.dtype)
        for source, values in terms.items():
            weight = tf.sign(share) if term_rule(source, self.towers.rules) == "sum" else share
            for term in values:
                loss += tf.cast(tf.reduce_sum(term), own.dtype) * tf.cast(weight, own.dtype)
        return loss


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the towers returned from one step.

    Attributes:
        step: The `LossStep`.
        shards: The `Shards` of the batch.
        results: For each tower what `LossStep.on_tower` returned.
        scales: The weight of each tower's compiled loss.
        state: The merged new value of each variable that the model assigned.
    """

    step: LossStep
    shards: Shards
    results: list[dict[str, Any]]
    scales: list[tf.Tensor]
    state: list[tuple[keras.Variable, tf.Tensor]]

    def loss(self) -> tf.Tensor:
        """The loss of the whole batch, without weight regularisers."""
        return tf.add_n([result["loss"] for result in self.results])

    def gradients(self) -> list[Any]:
        """The gradients of `loss()`, one for each trainable weight."""
        towers = [result["gradients"] for result in self.results]
        return [merge.total(column) for column in zip(*towers, strict=True)]

    def outputs(self) -> Any:
        """The merged outputs; only if the towers do not count."""
        parts = [result["outputs"] for result in self.results]
        return merge.outputs(parts, self.shards, self.step.towers.rules)

    def update_counters(self) -> None:
        """Adds what the towers counted to compiled metrics and loss trackers."""
        model = self.step.model
        for tracker, *values in zip(
            _compat.loss_trackers(model), *[r["losses"] for r in self.results], strict=True
        ):
            pairs = zip(values, self.scales, strict=True)
            value = tf.add_n([value * tf.cast(scale, value.dtype) for value, scale in pairs])
            rows = self.shards.total
            # Keras weights this mean by the batch size where it is known while tracing.
            tracker.update_state(value, sample_weight=rows if isinstance(rows, int) else None)
        if not self.step.count:
            return
        trackers = {id(v) for m in _compat.loss_trackers(model) for v in m.variables}
        counts = zip(*[result["counts"] for result in self.results], strict=True)
        for counter, added in zip(self.step.counters(), counts, strict=True):
            if id(counter) not in trackers:
                counter.assign_add(merge.live_sum(added, self.shards.shares()))


def _check_rows(y_pred: Any) -> None:
    for leaf in keras.tree.flatten(y_pred):
        rows_alone = isinstance(leaf, tf.Tensor) and (leaf.shape.rank or 0) > 1
        if not rows_alone or _compat.get_mask(leaf) is not None:
            raise NeedsWholeBatch
