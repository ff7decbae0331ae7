"""What layers make of their rows: what they move by them, terms of the loss, numbers they leave.

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
from parallel_keras.towers.recompute import values_are_known
from parallel_keras.towers.seeds import is_seed
from parallel_keras.towers.trial import (
    GROUPS,
    MANY,
    TRIED,
    Trial,
    close,
    in_any_order,
    is_mean,
    is_random,
    near,
)

# Layers whose variables are known not to move by rows, or have rules of their own.
_KNOWN = (
    keras.layers.BatchNormalization,
    keras.layers.Normalization,
    keras.layers.SpectralNormalization,
)
_ROUNDING = 5e-7
# How often a random term is tried, and how far a ratio of the means may be off.
_TIMES = 8
_RATIO_OFF = 0.15


class Move(NamedTuple):
    """How the values that towers gave to a variable become one.

    Attributes:
        kind: `"mean"`, `"sum"`, `"max"`, `"min"`; `"steps"` if an integer moved whatever the rows
            were, `"none"` if no such rule is right, and `"unknown"` if it could not be found out.
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
                self._calls.setdefault(id(layer), (specs(args), specs(kwargs)))
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
            variable: A variable that a layer assigned.

        Returns:
            The `Move`.
        """
        if _compat.in_stateless_scope():  # Nothing has a value there, and none is needed.
            return Move("unknown")
        if id(variable) not in self._moves:
            self._moves[id(variable)] = self._find_out(variable)
        return self._moves[id(variable)]

    def terms(self, layer: keras.layers.Layer) -> list[str] | None:
        """How the terms that a layer gives to `add_loss` depend on the rows.

        Args:
            layer: The layer.

        Returns:
            For each of its terms `"mean"`, `"sum"`, `"none"` if it is neither, or `"unknown"`.
            Empty if nothing could be found out, `None` where nothing needs to be.
        """
        if not values_are_known():
            return None
        if id(layer) not in self._calls:
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
                return _judge_terms(layer, self._calls[id(layer)])
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
    dtype = tf.as_dtype(variable.dtype)
    olds = _olds(trial, tuple(variable.shape), dtype)
    seen = [{g: trial.new(variable, g, old) for g in TRIED} for old in olds]
    if not all(np.isfinite(value).all() for values in seen for value in values.values()):
        return Move("unknown")
    first = seen[0]
    if all(_is_same(v, dtype) for v in seen):
        counts = not dtype.is_floating and not near(first["a"], olds[0])
        return Move("steps" if counts else "unknown")
    if all(in_any_order(v, dtype) for v in seen):
        if dtype.is_floating and all(is_mean(v, dtype) for v in seen):
            return Move("mean")
        for kind, pick in (("max", np.maximum), ("min", np.minimum)):
            if all(close(v["a" + g], pick(v["a"], v[g]), v, dtype) for v in seen for g in "bc"):
                return Move(kind)
        decay = None if dtype.is_bool else _decay(olds, seen, dtype)
        if decay == 1.0 or (decay is not None and dtype.is_floating):
            return Move("sum", decay)
    other = trial.new(variable, "a", olds[0], shift=1)
    return Move("unknown" if is_random(trial.layer, first["a"], other) else "none")


def _is_same(seen: dict[str, Any], dtype: tf.DType) -> bool:
    """Whether the rows made no difference but for rounding."""
    none = dict.fromkeys(TRIED, seen["a"])
    return all(close(value, seen["a"], none, dtype) for value in seen.values())


def _olds(trial: Trial, shape: tuple[int, ...], dtype: tf.DType) -> list[Any]:
    """Values that a variable may have had before, of either sign at each place."""
    if dtype.is_bool:
        return [np.zeros(shape), *(trial.random.integers(0, 2, shape) for _ in range(2))]
    signs = trial.random.choice([-1.0, 1.0], shape)
    olds = [sign * signs * trial.random.uniform(5, 15, shape) for sign in (1, -1, 1)]
    return olds if dtype.is_floating else [np.round(old) for old in olds]


def _judge_terms(layer: keras.layers.Layer, call: tuple[Any, ...]) -> list[str]:
    kinds = _terms_of(Trial(layer, call))
    if "unknown" in kinds and call[1].get("training"):
        # What drops or normalises rows does not while it is not trained.
        calm = _terms_of(Trial(layer, (call[0], {**call[1], "training": False})))
        if len(calm) == len(kinds):
            kinds = [k if k != "unknown" else c for k, c in zip(kinds, calm, strict=True)]
    return kinds


def _terms_of(trial: Trial) -> list[str]:
    seen = {groups: trial.terms(groups) for groups in TRIED}
    other = trial.terms("a", shift=1)
    count = len(other)
    if {len(terms) for terms in seen.values()} != {count}:
        return []
    kinds = [
        _judge_term({g: terms[i] for g, terms in seen.items()}, other[i], trial.layer)
        for i in range(count)
    ]
    if "unknown" not in kinds:
        return kinds
    many, more = ([trial.terms(MANY * times, n) for n in range(_TIMES)] for times in (1, 2))
    return [
        _judge_random([terms[i] for terms in many], [terms[i] for terms in more])
        if kind == "unknown" and not np.ndim(other[i])
        else kind
        for i, kind in enumerate(kinds)
    ]


def _judge_left(trial: Trial) -> dict[str, str]:
    seen = {groups: trial.left(groups) for groups in TRIED}
    other = trial.left("a", shift=1)
    paths = [path for path in other if all(path in numbers for numbers in seen.values())]
    return {
        path: _judge_number({g: seen[g][path] for g in TRIED}, other[path], trial.layer)
        for path in paths
    }


def _judge_number(seen: dict[str, Any], other: Any, layer: keras.layers.Layer) -> str:
    if all(seen[groups] == sum(GROUPS[group] for group in groups) for groups in TRIED):
        return "rows"
    for kind, pick in (("max", np.maximum), ("min", np.minimum)):
        several = seen["a"] != seen["b"] or seen["a"] != seen["c"]
        joined = all(close(seen["a" + g], pick(seen["a"], seen[g]), seen) for g in "bc")
        if several and joined and in_any_order(seen):
            return kind
    return _judge_term(seen, other, layer)


def _judge_term(seen: dict[str, Any], other: Any, layer: keras.layers.Layer) -> str:
    if any(np.ndim(value) or not np.isfinite(value) for value in seen.values()):
        return "unknown"
    if in_any_order(seen):
        if is_mean(seen):
            return "mean"
        if all(close(seen["a" + group], seen["a"] + seen[group], seen) for group in "bc"):
            return "sum"
    return "unknown" if is_random(layer, seen["a"], other) else "none"


def _judge_random(many: list[Any], more: list[Any]) -> str:
    """Whether a random term is a sum: then it is about twice as large where each row is twice.

    One that stays as large may be a mean, or look at several rows: that cannot be told.
    """
    once, twice = np.mean(many), np.mean(more)
    noise = (np.std(many) + np.std(more)) / np.sqrt(_TIMES)
    return "sum" if abs(twice - 2 * once) < _RATIO_OFF * abs(once) > noise else "unknown"


def _decay(olds: Sequence[Any], seen: Sequence[dict[str, Any]], dtype: tf.DType) -> float | None:
    """How much of the old value a sum over rows is added to, `None` if it is no such sum."""
    bases = [values["a"] + values["b"] - values["ab"] for values in seen]
    others = [values["a"] + values["c"] - values["ac"] for values in seen]
    ratios = np.stack([base / old for base, old in zip(bases, olds, strict=True)])
    decay = float(np.median(ratios))
    # People write 0.99, and what is measured is off in the seventh digit.
    rounded = [round(decay, digits) for digits in range(1, 6)]
    decay = next((number for number in rounded if abs(number - decay) < _ROUNDING), decay)
    same = [
        close(base, decay * old, v, dtype) and close(base, other, v, dtype)
        for base, other, old, v in zip(bases, others, olds, seen, strict=True)
    ]
    return decay if all(same) else None


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
    return not is_seed(variable) and variable.aggregation != "only_first_replica"


def specs(nest: Any) -> Any:
    """The nest with a `tf.TensorSpec` for each tensor."""
    return keras.tree.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf, nest
    )
