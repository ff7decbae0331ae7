"""Floats that layers move by their rows: whether by a mean, a sum, or to the largest of them.

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
from parallel_keras.towers.graph import calling
from parallel_keras.towers.seeds import is_seed

# Rows of the groups that a layer is tried on.
_GROUPS = {"a": 3, "b": 2, "c": 4}
_UNKNOWN_SIZE = 3
# Layers whose variables are known not to move by rows, or have rules of their own.
_KNOWN = (
    keras.layers.BatchNormalization,
    keras.layers.Normalization,
    keras.layers.SpectralNormalization,
)
_SAME = 1e-4
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
        self._calls: dict[int, tuple[Any, ...]] = {}
        self._moves: dict[int, Move] = {}

    @property
    def may_move(self) -> bool:
        """Whether there is any variable that may move by the rows."""
        return bool(self._layers)

    @contextlib.contextmanager
    def noting_calls(self) -> Iterator[None]:
        """Inside, it is noted what layers that may move something are called with."""

        def noting(layer: keras.layers.Layer, whole: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._calls.setdefault(id(layer), (_specs(args), _specs(kwargs)))
                return whole(*args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for layer in {id(layer): layer for layer in self._layers.values()}.values():
                stack.enter_context(calling(layer, noting(layer, layer.call)))
            yield

    def move(self, variable: keras.Variable) -> Move:
        """How a variable moves, found out when it is first asked for.

        Args:
            variable: A variable of floats that a layer assigned.

        Returns:
            The `Move`.
        """
        if id(variable) not in self._moves:
            self._moves[id(variable)] = self._find_out(variable)
        return self._moves[id(variable)]

    def _find_out(self, variable: keras.Variable) -> Move:
        layer = self._layers.get(id(variable))
        call = self._calls.get(id(layer))
        if layer is None or call is None:
            return Move("unknown")
        try:
            with tf.init_scope():
                return _judge(_Trial(layer, variable, call))
        except Exception:  # noqa: BLE001 (a layer that cannot be tried may fail in any way)
            return Move("unknown")


class _Trial:
    """One layer, called on random rows, with random values of one of its variables."""

    def __init__(
        self, layer: keras.layers.Layer, variable: keras.Variable, call: tuple[Any, ...]
    ) -> None:
        self.layer, self._call, self._random = layer, call, np.random.default_rng(0)
        self._trainable = [tf.convert_to_tensor(v.value) for v in layer.trainable_variables]
        self._others = layer.non_trainable_variables
        (self._place,) = [i for i, other in enumerate(self._others) if other is variable]
        self._groups = {name: self._leaves(rows) for name, rows in _GROUPS.items()}
        shape = tuple(variable.shape)
        signs = self._random.choice([-1.0, 1.0], shape)
        self.olds = [signs * self._random.uniform(5, 15, shape) for _ in range(3)]

    def new(self, groups: str, old: Any, shift: int = 0) -> Any:
        """What the variable is after a call on these groups of rows.

        Args:
            groups: Their names.
            old: What it was before.
            shift: What is added to the seeds.
        """
        leaves = [
            np.concatenate(parts) if np.ndim(parts[0]) else parts[0]
            for parts in zip(*[self._groups[name] for name in groups], strict=True)
        ]
        found = iter(leaves)
        args, kwargs = keras.tree.map_structure(
            lambda leaf: tf.constant(next(found)) if isinstance(leaf, tf.TensorSpec) else leaf,
            self._call,
        )
        values = [
            tf.convert_to_tensor(other.value) + (shift if is_seed(other) else 0)
            if other.dtype != "bool"
            else tf.convert_to_tensor(other.value)
            for other in self._others
        ]
        values[self._place] = tf.cast(old, values[self._place].dtype)
        _, after = self.layer.stateless_call(self._trainable, values, *args, **kwargs)
        return np.asarray(after[self._place], "float64")

    def _leaves(self, rows: int) -> list[Any]:
        specs = [x for x in keras.tree.flatten(self._call) if isinstance(x, tf.TensorSpec)]
        return [self._leaf(spec, rows) for spec in specs]

    def _leaf(self, spec: tf.TensorSpec, rows: int) -> Any:
        shape = [size or _UNKNOWN_SIZE for size in spec.shape]
        shape[:1] = [rows] if shape else []
        if spec.dtype == tf.bool:
            return np.ones(shape, bool)
        if spec.dtype.is_floating:
            return self._random.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
        return self._random.integers(0, 2, shape).astype(spec.dtype.as_numpy_dtype)


def _judge(trial: _Trial) -> Move:
    olds = trial.olds
    seen = [{g: trial.new(g, old) for g in ("a", "b", "c", "ab", "ac")} for old in olds]
    if not all(np.isfinite(value).all() for values in seen for value in values.values()):
        return Move("unknown")
    first = seen[0]
    if _near(first["a"], first["b"]) and _near(first["a"], first["c"]):
        return Move("unknown")

    joins: dict[str, Callable[[Any, Any, str], Any]] = {
        "mean": lambda one, other, group: np.average(
            [one, other], axis=0, weights=[_GROUPS["a"], _GROUPS[group]]
        ),
        "max": lambda one, other, _: np.maximum(one, other),
        "min": lambda one, other, _: np.minimum(one, other),
    }
    for kind, join in joins.items():
        if all(_near(v[f"a{g}"], join(v["a"], v[g], g)) for v in seen for g in "bc"):
            return Move(kind)
    decay = _decay(olds, seen)
    if decay is not None:
        return Move("sum", decay)
    layers = _compat.all_layers(trial.layer)
    by_shard = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    if by_shard or not _near(trial.new("a", olds[0], shift=1), first["a"]):
        return Move("unknown")
    return Move("none")


def _decay(olds: Sequence[Any], seen: Sequence[dict[str, Any]]) -> float | None:
    """How much of the old value a sum over rows is added to, `None` if it is no such sum."""
    bases = [values["a"] + values["b"] - values["ab"] for values in seen]
    others = [values["a"] + values["c"] - values["ac"] for values in seen]
    ratios = np.stack([base / old for base, old in zip(bases, olds, strict=True)])
    decay = float(np.median(ratios))
    # People write 0.99, and what is measured is off in the seventh digit.
    rounded = [round(decay, digits) for digits in range(1, 6)]
    decay = next((number for number in rounded if abs(number - decay) < _ROUNDING), decay)
    same = [_near(base, decay * old) for base, old in zip(bases, olds, strict=True)]
    return decay if all(same) and all(map(_near, bases, others)) else None


def _near(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=_SAME, atol=_SAME))


def _may_move(variable: keras.Variable) -> bool:
    return tf.as_dtype(variable.dtype).is_floating and variable.aggregation != "only_first_replica"


def _specs(nest: Any) -> Any:
    return keras.tree.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype) if tf.is_tensor(leaf) else leaf, nest
    )
