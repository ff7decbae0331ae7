"""The step in which each tower computes its part of the loss and its gradients.

Outputs never leave their device: over the merge device go gradients, a few
scalars and the metrics' counts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.graphs.graph import hide_value
from parallel_keras.graphs.outputs import are_by_rows, are_rows, found_rules
from parallel_keras.shard import Shards
from parallel_keras.steps.loss_results import LossResult, TowerRun
from parallel_keras.towers.call import as_call, takes_training
from parallel_keras.towers.collectives import talking_to
from parallel_keras.towers.losses import term_rule

if TYPE_CHECKING:
    from parallel_keras.towers.results import State
    from parallel_keras.towers.run import Towers


class NeedsWholeBatch(Exception):  # noqa: N818 (it asks for the other path, it is not an error)
    """The loss turned out, while tracing, not to be a sum over rows."""


@dataclasses.dataclass(frozen=True)
class LossStep:
    """A forward pass, loss and gradients on each tower: `shard`, `run`, `merge`.

    Args:
        towers: The `Towers`.
        model: The compiled model whose losses and metrics are meant.
        reduction: `"mean"` or `"sum"`, how the towers' losses add up.
        count: Whether the towers update the compiled metrics too; if not, they
            return their outputs.
        training: Whether gradients are computed.
        loss_scale: Scalar that the loss is multiplied by before gradients are taken,
            or `None`. Defaults to `None`.
    """

    towers: Towers
    model: keras.Model
    reduction: str
    count: bool
    training: bool
    loss_scale: Any = None

    def shard(self, data: tuple[Any, Any, Any]) -> Shards:
        """Cuts inputs, targets and sample weights (or `None`) of the batch."""
        x, y, sample_weight = data
        batch = {"call": as_call((x,), {}, None), "y": y, "weights": sample_weight}
        return self.towers.shard(batch, fed_here=self.count)

    def run(self, shards: Shards) -> TowerRun:
        """Runs the towers.

        Args:
            shards: The batch, cut.

        Returns:
            The `TowerRun`.

        Raises:
            NeedsWholeBatch: While tracing, if outputs have masks or no row axis:
                then the loss of the batch is not the mean of those of the shards.
        """
        towers = self.towers
        weights = towers.read_weights(tables=True)
        with tf.device(towers.merge_device):
            shares = [hide_value(share) for share in shards.shares()]
            # A tower that only stands in must not add to a sum either.
            signs = [tf.sign(share) for share in shares]
        scales = signs if self.reduction == "sum" else shares
        pairs = [*zip(scales, shares, strict=True)][towers.workers.first :]
        numbers = dict(zip(towers.devices, pairs, strict=False))

        def call(body: Any, device: str, *given: Any) -> Any:
            return body(*given, numbers[device], self.loss_scale)

        # Kept as calls, towers start and run faster: nothing of theirs is needed outside.
        results = towers.run(self.on_tower, shards, weights, call, inline=False)
        topic = "train" if self.training else "test"
        results = self._summed(results)
        return TowerRun(shards, weights, scales, towers.workers.join(results, topic, shards))

    def merge(self, run: TowerRun) -> StepResult:
        """Joins what the towers returned."""
        state = self.towers.merge_state(run.results, run.weights, run.shards)
        return StepResult(self, run, state)

    def on_tower(
        self,
        weights: list[tf.Tensor],
        number: tf.Tensor | None,
        peers: Any,
        part: dict[str, Any],
        scales: tuple[tf.Tensor, tf.Tensor],
        loss_scale: tf.Tensor | None,
    ) -> LossResult:
        """The tower function of this step: nothing outside of it is changed."""
        tower, counters = self.towers.tower, self.counters()
        zeros = [tf.zeros(counter.shape, counter.dtype) for counter in counters]
        scope = tower.scope(weights, number, counters, zeros)
        sources = self._sources(weights) if self.training else []
        tape = tf.GradientTape(watch_accessed_variables=False)
        training = self.training if takes_training(tower.template) else None
        with talking_to(peers), tape:
            tape.watch(sources)
            with scope:
                y_pred = tower.call_template(scope, part["call"], training)
                self._check_rows(y_pred, part)
                data_loss = _compat.data_loss(self.model, part["y"], y_pred, part["weights"])
            # Metrics of any kind, or without a graph anybody, may read what is left on layers.
            read = bool(scope.left) and (not self.count or tf.executing_eagerly())
            if scope.activities or read:
                raise NeedsWholeBatch
            loss = self._weighted(data_loss, tower.terms(scope), part, *scales)
        up = None if loss_scale is None else tf.cast(loss_scale, loss.dtype)
        with scope, talking_to(peers):
            # Layers under a `keras.RematScope` are called again on the way back.
            gradients = tape.gradient(loss, sources, output_gradients=up) if sources else []
        given = (weights, number, peers, part, scales, loss_scale)
        gradients = self.towers.inquiry.sort(gradients, "loss", self._gradients_again, given)
        with scope, talking_to(peers):
            trackers = [tracker.result() for tracker in _compat.loss_trackers(self.model)]
            if self.count:
                _compat.update_metrics(self.model, part["y"], y_pred, part["weights"])
        state, constant = tower.updates(scope, (part, number), ignore=counters)
        return LossResult(
            loss=loss,
            trackers=trackers,
            gradients=gradients,
            counts=[scope.latest(counter) for counter in counters],
            outputs=None if self.count else y_pred,
            state=state,
            constant=constant,
        )

    def _summed(self, results: list[LossResult]) -> list[LossResult]:
        """The same results, with gradients added up, which the first has then."""
        if not results[0].gradients:
            return results
        columns = [list(column) for column in zip(*[r.gradients for r in results], strict=True)]
        rows = zip(*self.towers.summed(columns, self.model.trainable_weights), strict=True)
        pairs = zip(results, rows, strict=True)
        return [result.changed(gradients=list(row)) for result, row in pairs]

    def _check_rows(self, y_pred: Any, part: dict[str, Any]) -> None:
        """Leaves the loss to the whole batch unless each output has a row for each of the batch."""
        leaves = keras.tree.flatten(y_pred)
        for leaf in leaves:
            rows_alone = isinstance(leaf, tf.Tensor) and (leaf.shape.rank or 0) > 1
            if not rows_alone or _compat.get_mask(leaf) is not None:
                raise NeedsWholeBatch
        if not self.towers.alone and not are_rows(leaves, self.towers.inquiry.given_to(part)):
            raise NeedsWholeBatch

    def _gradients_again(self, *given: Any) -> list[Any]:
        return self.on_tower(*given).gradients

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
        data_loss: tf.Tensor,
        terms: dict[str, list[tf.Tensor]],
        part: dict[str, Any],
        scale: tf.Tensor,
        share: tf.Tensor,
    ) -> tf.Tensor:
        """This tower's part of the loss of the whole batch."""
        loss, rules = data_loss * tf.cast(scale, data_loss.dtype), self.towers.rules
        for key, values in terms.items():
            for term in values:
                added_up = term_rule(key.split("/")[0], rules) == "sum"
                if term.shape.rank and not added_up:
                    added_up = are_by_rows([term], self.towers.inquiry.given_to(part))
                weight = tf.sign(share) if added_up else share
                loss += tf.cast(tf.reduce_sum(term), loss.dtype) * tf.cast(weight, loss.dtype)
        return loss


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
        found = found_rules(here, towers.rules, given) if len(parts) > 1 else {}
        return merge.outputs(parts, self.run.shards, towers.rules, found)

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
