"""What layers make of their rows: floats that they move, terms of the loss, numbers they leave.

Nothing declares that, and a graph does not tell. So a layer that does it is tried, once, on a
few random rows: what it makes of two groups of rows must come from what it makes of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.towers.reachable import functions_of
from parallel_keras.towers.recompute import RecomputeScope
from parallel_keras.towers.trial import GROUPS, Trial, is_mean, is_random, near

# The groups of rows that a layer is tried on, alone and together.
_TRIED = ("a", "b", "c", "ab", "ac")
# Layers whose variables are known not to move by rows, or have rules of their own.
_KNOWN = (
    keras.layers.BatchNormalization,
    keras.layers.Normalization,
    keras.layers.SpectralNormalization,
)
_ROUNDING = 5e-7


class Move(NamedTuple):
    """How the values that towers gave to a variable become one.

    Attributes:
        kind: `"mean"`, `"sum"`, `"max"`, `"min"`; `"none"` if no such rule is right, and
            `"unknown"` if it could not be found out.
        decay: What a sum is added to, as a part of the old value.
    """

    kind: str
    decay: float = 1.0


class Moving:
    """Finds out how the layers of a model move their variables.

    Args:
        template: The model.
    """

    def __init__(self, template: keras.Model) -> None:
        self._layers: dict[int, keras.layers.Layer] = {}
        for layer in _compat.all_layers(template):
            if not isinstance(layer, _KNOWN):
                moved = [v for v in layer.non_trainable_variables if _may_move(v)]
                # Layers come before their sublayers, so the innermost one stays.
                self._layers.update({id(variable): layer for variable in moved})
        self._adding = [layer for layer in _compat.all_layers(template) if _adds_loss(layer)]
        # Code of the user's own may leave something on a layer.
        self._keeping = [x for x in _compat.all_layers(template) if functions_of(type(x))]
        self._calls: dict[int, tuple[Any, ...]] = {}
        self._terms: dict[int, list[str]] = {}
        self._moves: dict[int, Move] = {}
        self._left: dict[int, dict[str, str]] = {}

    @property
    def may_move(self) -> bool:
        """Whether there is any variable that may move by the rows."""
        return bool(self._layers)

    @contextlib.contextmanager
    def noting_calls(self) -> Iterator[None]:
        """Inside, it is noted what layers that may move something are called with."""

        def noting(layer: keras.layers.Layer, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._calls.setdefault(id(layer), (_specs(args), _specs(kwargs)))
                return original(*args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            watched = [*self._layers.values(), *self._adding, *self._keeping]
            for layer in {id(layer): layer for layer in watched}.values():
                stack.enter_context(calling(layer, noting(layer, layer.call)))
            yield

    def move(self, variable: keras.Variable) -> Move:
        """How a variable moves, found out when it is first asked for.

        Args:
            variable: A variable of floats that a layer assigned.

        Returns:
            The `Move`.
        """
        if _compat.in_stateless_scope():  # Nothing has a value there, and none is needed.
            return Move("unknown")
        if id(variable) not in self._moves:
            self._moves[id(variable)] = self._find_out(variable)
        return self._moves[id(variable)]

    def terms(self, layer: keras.layers.Layer) -> list[str]:
        """How the terms that a layer gives to `add_loss` depend on the rows.

        Args:
            layer: The layer.

        Returns:
            For each of its terms `"mean"`, `"sum"`, `"none"` if it is neither, or `"unknown"`.
            Empty if nothing could be found out.
        """
        scope = _compat.stateless_scope()
        symbolic = scope is not None and not isinstance(scope, RecomputeScope)
        if symbolic or id(layer) not in self._calls:
            return []
        if id(layer) not in self._terms:
            self._terms[id(layer)] = self._try_terms(layer)
        return self._terms[id(layer)]

    def left(self, layer: keras.layers.Layer, path: str) -> str:
        """How a single number that a layer leaves depends on the rows, see `left_behind`.

        Args:
            layer: The layer.
            path: What was left.

        Returns:
            One of the kinds of a `Move`, or `"rows"` for their number.
        """
        if _compat.in_stateless_scope() or id(layer) not in self._calls:
            return "unknown"
        if id(layer) not in self._left:
            try:
                with tf.init_scope():
                    self._left[id(layer)] = _judge_left(Trial(layer, self._calls[id(layer)]))
            except Exception:  # noqa: BLE001 (a layer that cannot be tried may fail in any way)
                self._left[id(layer)] = {}
        return self._left[id(layer)].get(path, "unknown")

    def _try_terms(self, layer: keras.layers.Layer) -> list[str]:
        if layer.activity_regularizer is not None:  # Its term would be among them.
            return []
        try:
            with tf.init_scope():
                return _judge_terms(Trial(layer, self._calls[id(layer)]))
        except Exception:  # noqa: BLE001 (a layer that cannot be tried may fail in any way)
            return []

    def _find_out(self, variable: keras.Variable) -> Move:
        layer = self._layers.get(id(variable))
        call = self._calls.get(id(layer))
        if layer is None or call is None:
            return Move("unknown")
        try:
            with tf.init_scope():
                return _judge(Trial(layer, call), variable)
        except Exception:  # noqa: BLE001 (a layer that cannot be tried may fail in any way)
            return Move("unknown")


def _judge(trial: Trial, variable: keras.Variable) -> Move:
    shape = tuple(variable.shape)
    signs = trial.random.choice([-1.0, 1.0], shape)
    olds = [signs * trial.random.uniform(5, 15, shape) for _ in range(3)]
    seen = [{g: trial.new(variable, g, old) for g in _TRIED} for old in olds]
    if not all(np.isfinite(value).all() for values in seen for value in values.values()):
        return Move("unknown")
    first = seen[0]
    if near(first["a"], first["b"]) and near(first["a"], first["c"]):
        return Move("unknown")
    if all(map(is_mean, seen)):
        return Move("mean")
    for kind, pick in (("max", np.maximum), ("min", np.minimum)):
        if all(near(v["a" + g], pick(v["a"], v[g])) for v in seen for g in "bc"):
            return Move(kind)
    decay = _decay(olds, seen)
    if decay is not None:
        return Move("sum", decay)
    other = trial.new(variable, "a", olds[0], shift=1)
    return Move("unknown" if is_random(trial.layer, first["a"], other) else "none")


def _judge_terms(trial: Trial) -> list[str]:
    seen = {groups: trial.terms(groups) for groups in _TRIED}
    other = trial.terms("a", shift=1)
    count = len(other)
    if {len(terms) for terms in seen.values()} != {count}:
        return []
    return [
        _judge_term({g: terms[i] for g, terms in seen.items()}, other[i], trial.layer)
        for i in range(count)
    ]


def _judge_left(trial: Trial) -> dict[str, str]:
    seen = {groups: trial.left(groups) for groups in _TRIED}
    other = trial.left("a", shift=1)
    paths = [path for path in other if all(path in numbers for numbers in seen.values())]
    return {
        path: _judge_number({g: seen[g][path] for g in _TRIED}, other[path], trial.layer)
        for path in paths
    }


def _judge_number(seen: dict[str, Any], other: Any, layer: keras.layers.Layer) -> str:
    if all(seen[groups] == sum(GROUPS[group] for group in groups) for groups in _TRIED):
        return "rows"
    for kind, pick in (("max", np.maximum), ("min", np.minimum)):
        several = seen["a"] != seen["b"] or seen["a"] != seen["c"]
        if several and all(near(seen["a" + g], pick(seen["a"], seen[g])) for g in "bc"):
            return kind
    return _judge_term(seen, other, layer)


def _judge_term(seen: dict[str, Any], other: Any, layer: keras.layers.Layer) -> str:
    if any(np.ndim(value) or not np.isfinite(value) for value in seen.values()):
        return "unknown"
    if is_mean(seen):
        return "mean"
    if all(near(seen["a" + group], seen["a"] + seen[group]) for group in "bc"):
        return "sum"
    return "unknown" if is_random(layer, seen["a"], other) else "none"


def _decay(olds: Sequence[Any], seen: Sequence[dict[str, Any]]) -> float | None:
    """How much of the old value a sum over rows is added to, `None` if it is no such sum."""
    bases = [values["a"] + values["b"] - values["ab"] for values in seen]
    others = [values["a"] + values["c"] - values["ac"] for values in seen]
    ratios = np.stack([base / old for base, old in zip(bases, olds, strict=True)])
    decay = float(np.median(ratios))
    # People write 0.99, and what is measured is off in the seventh digit.
    rounded = [round(decay, digits) for digits in range(1, 6)]
    decay = next((number for number in rounded if abs(number - decay) < _ROUNDING), decay)
    same = [near(base, decay * old) for base, old in zip(bases, olds, strict=True)]
    return decay if all(same) and all(map(near, bases, others)) else None


def _adds_loss(layer: keras.layers.Layer) -> bool:
    """Whether a class of its own has code that speaks of `add_loss`."""
    return any(
        "add_loss" in function.__code__.co_names
        for kind in type(layer).__mro__
        if not kind.__module__.startswith("keras.")
        for function in vars(kind).values()
        if hasattr(function, "__code__")
    )


def _may_move(variable: keras.Variable) -> bool:
    return tf.as_dtype(variable.dtype).is_floating and variable.aggregation != "only_first_replica"


def _specs(nest: Any) -> Any:
    return keras.tree.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf, nest
    )
