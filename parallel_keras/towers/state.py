"""Which variable of a model is merged by which rule."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.towers.moving import Move, Moving
from parallel_keras.towers.results import Updates
from parallel_keras.towers.saying import warn_once
from parallel_keras.towers.seeds import is_seed


class StateRules:
    """How the updates that the towers made to variables become one.

    | variable                                  | rule                                       |
    |-------------------------------------------|--------------------------------------------|
    | seed state; anything that did not depend on the shard | the first tower's              |
    | metric state; `aggregation="sum"`         | what each tower added, added up            |
    | `keras.metrics.Mean` fed with scalars     | mean weighted by rows, counted once        |
    | `aggregation="only_first_replica"`        | the first tower's                          |
    | BatchNormalization's moving statistics    | those of the whole batch                   |
    | others                                    | as `Moving` finds out: the mean by rows, a |
    |                                           | sum on a part of the old, the largest, ... |

    Args:
        template: The model whose variables are meant.
        in_loops: The ids of the variables of which only the last value is known.
        moving: Finds out how its layers move variables.
        rules: What was declared, `"mean"` or `"sum"` by the name of a variable.
    """

    def __init__(
        self,
        template: keras.Model,
        in_loops: Collection[int],
        moving: Moving,
        rules: Mapping[str, str],
    ) -> None:
        self._in_loops = in_loops
        layers = _compat.all_layers(template)
        self._moving, self._rules = moving, rules
        self._normalizations = [
            layer
            for layer in layers
            if isinstance(layer, keras.layers.BatchNormalization) and layer.built
        ]
        metrics = _compat.layer_metrics(template)
        self._metric_variables = {id(v) for metric in metrics for v in metric.variables}
        self._means = [metric for metric in metrics if isinstance(metric, keras.metrics.Mean)]
        self._fed_scalars: set[int] = set()
        self.synchronized = any(
            getattr(layer, "synchronized", False) for layer in self._normalizations
        )
        # Counters of rows look like plain constants where the batch size is known while tracing.
        self.counts_rows = bool(self._metric_variables or moving.may_move) or any(
            not is_seed(variable) and not keras.backend.is_float_dtype(variable.dtype)
            for variable in template.variables
        )

    @contextlib.contextmanager
    def noting_scalars(self) -> Iterator[None]:
        """Inside, it is noted which means are fed with scalars.

        A graph tells that their count does not depend on the shard. Without one, a scalar
        from a tower looks like one row.
        """
        self._fed_scalars.clear()
        plain = [metric for metric in self._means if type(metric) is keras.metrics.Mean]
        try:
            for metric in plain:
                vars(metric)["update_state"] = functools.partial(self._update_mean, metric)
            yield
        finally:
            for metric in plain:
                del vars(metric)["update_state"]

    def _update_mean(self, metric: keras.metrics.Mean, values: Any, *args: Any, **kw: Any) -> None:
        if not keras.ops.ndim(values):
            self._fed_scalars.add(id(metric))
        keras.metrics.Mean.update_state(metric, values, *args, **kw)

    def merge(
        self,
        variables: Sequence[keras.Variable],
        before: Mapping[int, Any],
        towers: Sequence[Updates],
        constant: Updates,
        shares: Sequence[tf.Tensor],
    ) -> dict[int, tf.Tensor]:
        """Merges the updates.

        Args:
            variables: The variables, by index.
            before: The values before the step of those that the towers assigned, by index.
            towers: For each tower, the values that it assigned, by the index of
                the variable, in order.
            constant: The first tower's updates that do not depend on the shard.
            shares: The towers' shares of the batch.

        Returns:
            The new value by the index of the variable.
        """
        index_of = {id(variable): index for index, variable in enumerate(variables)}
        merged = {index: values[-1] for index, values in constant.items()}
        varying = towers[0].keys()
        merged.update(self._normalized(index_of, before, towers, shares))
        scalar_fed = {
            id(variable)
            for metric in self._means
            if index_of.get(id(metric.count)) in constant or id(metric) in self._fed_scalars
            for variable in (metric.total, metric.count)
        }
        for index in varying - merged.keys():
            variable = variables[index]
            values = [updates[index][-1] for updates in towers]
            if id(variable) in scalar_fed:
                merged[index] = merge.mean(values, shares)
            else:
                merged[index] = self._by_kind(variable, before[index], values, shares)
        return merged

    def _normalized(
        self,
        index_of: dict[int, int],
        before: Mapping[int, Any],
        towers: Sequence[Updates],
        shares: Sequence[tf.Tensor],
    ) -> dict[int, tf.Tensor]:
        """The moving statistics of the layers that normalised, all layers of a kind at once.

        Deep nets have so many that merging one by one is a good part of the time to trace.
        """
        alike: dict[Any, list[tuple[int, int]]] = {}
        for layer in self._normalizations:
            if id(layer.moving_mean) in self._in_loops:
                continue
            pair = index_of[id(layer.moving_mean)], index_of[id(layer.moving_variance)]
            if all(index in towers[0] for index in pair):
                kind = (layer.momentum, layer.moving_mean.dtype, len(towers[0][pair[0]]))
                alike.setdefault(kind, []).append(pair)
        merged: dict[int, tf.Tensor] = {}
        for (momentum, _, count), pairs in alike.items():
            means, variances = zip(*pairs, strict=True)
            start = tf.concat([before[index] for index in means], axis=0)
            histories = [
                [tf.concat([updates[i][step] for i in means], axis=0) for step in range(count)]
                for updates in towers
            ]
            ends = [tf.concat([updates[i][-1] for i in variances], axis=0) for updates in towers]
            joined = merge.moving_moments(
                [[start, *history] for history in histories], ends, shares, momentum
            )
            sizes = [before[index].shape[0] for index in means]
            for indices, values in zip((means, variances), joined, strict=True):
                merged.update(zip(indices, tf.split(values, sizes), strict=True))
        return merged

    def _by_kind(
        self,
        variable: keras.Variable,
        before: tf.Tensor,
        values: list[tf.Tensor],
        shares: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        if is_seed(variable) or variable.aggregation == "only_first_replica":
            return values[0]
        dtype = values[0].dtype
        added_up = not dtype.is_floating and variable.aggregation == "sum"
        if id(variable) in self._metric_variables or added_up:
            return merge.increments(before, values, shares)
        if dtype.is_complex:
            return merge.mean(values, shares)
        return self._moved(variable, before, values, shares)

    def _moved(
        self,
        variable: keras.Variable,
        before: tf.Tensor,
        values: list[tf.Tensor],
        shares: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        move = self._move(variable, values) if len(values) > 1 else Move("steps")
        if move.kind == "steps":
            return values[0]
        if move.kind in ("max", "min"):
            return merge.extreme(values, move.kind)
        if move.kind == "sum" and move.decay == 1.0:
            return merge.increments(before, values, shares)
        if move.kind == "sum":
            kept = before * tf.cast(move.decay, before.dtype)
            return kept + merge.live_sum([value - kept for value in values], shares)
        if move.kind == "mean":
            return merge.mean(values, shares)
        raise ValueError(
            f"Variable {variable.path!r} is made of the rows in a way that parts of the batch "
            "cannot: it is no mean or sum over rows, and not the largest or smallest of them. "
            f"Received: name={variable.name!r}, aggregation={variable.aggregation!r}. Keep sums "
            "and means in variables of their own, and compute from them when the layer is called; "
            'or have it taken for a mean, which differs from one device: rules={"'
            f'{variable.name}": "mean"}}; or use one device: devices=1.'
        )

    def _move(self, variable: keras.Variable, values: list[tf.Tensor]) -> Move:
        """How a variable moves, as declared or found out; or what it is taken for."""
        declared = self._rules.get(variable.name)
        if declared is None and variable.aggregation == "mean":
            declared = "mean"
        move = self._moving.move(variable) if declared is None else Move(declared)
        if move.kind != "unknown":
            return move
        # Without a graph nothing else tells what is made of steps from what is made of rows.
        if tf.executing_eagerly() and tf.reduce_all(tf.equal(tf.stack(values), values[0])):
            return Move("steps")
        counts = variable.aggregation == "sum" or not values[0].dtype.is_floating
        move = Move("sum" if counts else "mean")
        warn_once(
            variable,
            "Variable %s depends on the rows, and it could not be found out how: it is taken "
            "for a %s over rows. If it is not, its values differ from those on one device.",
            variable.path,
            move.kind,
        )
        return move
