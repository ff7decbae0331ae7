"""A layer is tried on a few random rows, to find out what nothing declares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.towers.left_behind import Left, noting
from parallel_keras.towers.reachable import whole_numbers
from parallel_keras.towers.seeds import is_seed

# Rows of the groups that a layer is tried on.
GROUPS = {"a": 3, "b": 2, "c": 4, "m": 32}
# How large their numbers are: what is bounded from below or above is so for some of them.
_SCALES = {"b": 0.1, "c": 3.0}
# A group that is large enough for chance to even out.
MANY = "m"
# Those that something is tried on, alone and together.
TRIED = ("a", "b", "c", "ab", "ac", "ba")
_UNKNOWN_SIZE = 3
# The bytes of a number that does not round away what is to be found out.
_FULL = 4
_TOLERANCE = 1e-4
# The distance from 1 to the next number.
_LAST_DIGIT = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}
# How many times the last digit sums of a few numbers may be off.
_DIGITS = 16


class Trial:
    """One layer, called on a few groups of random rows; nothing of it is changed.

    Args:
        layer: The layer.
        call: What it is called with, positional and keyword arguments, with a `tf.TensorSpec`
            for each tensor.
    """

    def __init__(self, layer: keras.layers.Layer, call: tuple[Any, ...]) -> None:
        self.layer, self.random = layer, np.random.default_rng(0)
        self._call = call
        self._groups = {name: self._leaves(name) for name in GROUPS}

    def new(self, variable: keras.Variable, groups: str, old: Any, shift: int = 0) -> Any:
        """What a variable is after a call on these groups of rows.

        Args:
            variable: A variable of the layer.
            groups: Their names.
            old: What it was before.
            shift: What is added to the seeds.
        """
        scope, _ = self._after_call(groups, [(variable, tf.cast(old, variable.dtype))], shift)
        return np.asarray(scope.get_current_value(variable), "float64")

    def terms(self, groups: str, shift: int = 0) -> list[Any]:
        """What the layer itself gives to `add_loss` in a call on these groups of rows.

        Args:
            groups: Their names.
            shift: What is added to the seeds.
        """
        scope, _ = self._after_call(groups, [], shift)
        owners = _compat.loss_owners(self.layer)
        return [np.asarray(term, "float64") for term in scope.losses if owners.get(id(term)) == 0]

    def left(self, groups: str, shift: int = 0) -> dict[str, Any]:
        """The single numbers that the layer itself leaves, by path, see `left_behind`.

        Args:
            groups: Their names.
            shift: What is added to the seeds.
        """
        before = whole_numbers(self.layer)
        _, left = self._after_call(groups, [], shift)
        found = {
            path: np.asarray(value, "float64")
            for path, value in left.get("0", {}).items()
            if value.shape.rank == 0 and value.dtype != tf.string
        }
        counts = whole_numbers(self.layer)
        vars(self.layer).update(before)
        return {**{name: np.asarray(count, "float64") for name, count in counts.items()}, **found}

    def outputs(self, groups: str, training: Any, shift: int = 0) -> Any:
        """What a call on these groups of rows returns.

        Args:
            groups: Their names.
            training: Bool or `None`, the argument of that name.
            shift: What is added to the seeds.
        """
        args, kwargs = self._arguments(groups)
        given = {} if training is None else {"training": training}
        with _OtherSeeds([], shift), _in_full_precision(self.layer):
            return self.layer(*args, **{**kwargs, **given})

    def _after_call(
        self, groups: str, values: list[Any], shift: int
    ) -> tuple[keras.StatelessScope, Left]:
        args, kwargs = self._arguments(groups)
        _compat.forget_loss_owners(self.layer)
        with (
            _OtherSeeds(values, shift) as scope,
            noting(_compat.all_layers(self.layer)) as left,
            _in_full_precision(self.layer),
        ):
            self.layer(*args, **kwargs)
        return scope, left

    def _arguments(self, groups: str) -> Any:
        """Positional and keyword arguments with the rows of these groups."""
        leaves = [
            np.concatenate(parts) if np.ndim(parts[0]) else parts[0]
            for parts in zip(*[self._groups[name] for name in groups], strict=True)
        ]
        found = iter(leaves)
        return keras.tree.map_structure(
            lambda leaf: tf.constant(next(found)) if isinstance(leaf, tf.TensorSpec) else leaf,
            self._call,
        )

    def _leaves(self, group: str) -> list[Any]:
        specs = [x for x in keras.tree.flatten(self._call) if isinstance(x, tf.TensorSpec)]
        return [self._leaf(spec, group) for spec in specs]

    def _leaf(self, spec: tf.TensorSpec, group: str) -> Any:
        shape = [size or _UNKNOWN_SIZE for size in spec.shape]
        shape[:1] = [GROUPS[group]] if shape else []
        if spec.dtype == tf.bool:
            return np.ones(shape, bool)
        if spec.dtype.is_floating:
            numbers = _SCALES.get(group, 1.0) * self.random.normal(size=shape)
            return numbers.astype("float32" if spec.dtype.size < _FULL else spec.dtype.name)
        return self.random.integers(0, 2, shape).astype(spec.dtype.as_numpy_dtype)


@contextlib.contextmanager
def _in_full_precision(layer: keras.layers.Layer) -> Iterator[None]:
    """Inside, layers that compute in half precision do not: rounding hides what they compute."""
    halves = [
        (one, one.dtype_policy)
        for one in _compat.all_layers(layer)
        if one.compute_dtype in ("float16", "bfloat16")
    ]
    try:
        for one, _ in halves:
            one.dtype_policy = "float32"
        yield
    finally:
        for one, policy in halves:
            one.dtype_policy = policy


class _OtherSeeds(keras.StatelessScope):
    """Changes nothing, and has random numbers drawn from other seeds, that of Keras included."""

    def __init__(self, values: list[Any], shift: int) -> None:
        super().__init__(state_mapping=values, collect_losses=True)
        self._shift = shift
        self._reading = False

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value of a variable here, `None` for the variable itself."""
        value = super().get_current_value(variable)
        if value is None and is_seed(variable) and not self._reading:
            self._reading = True
            value = tf.convert_to_tensor(variable.value) + self._shift
            self._reading = False
        return value


def near(one: Any, other: Any) -> bool:
    """Whether two results are the same but for rounding."""
    return bool(np.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE))


def close(one: Any, other: Any, seen: dict[str, Any], dtype: Any = "float32") -> bool:
    """Whether two results are the same, measured by how much the rows change anything.

    A moving average is mostly what it was before, which would hide what it is an average of.

    Args:
        one: A result.
        other: Another one.
        seen: What came of the groups in `TRIED`.
        dtype: The type that they were rounded to.
    """
    values = np.stack([seen[groups] for groups in TRIED])
    spread = np.abs(values - values[0]).max(axis=0)
    digit = _LAST_DIGIT.get(tf.as_dtype(dtype).name, _LAST_DIGIT["float32"])
    rounding = _DIGITS * digit * max(1.0, np.abs(values).max(initial=0.0))
    return bool(np.all(np.abs(one - other) <= _TOLERANCE * spread + rounding))


def in_any_order(seen: dict[str, Any], dtype: Any = "float32") -> bool:
    """Whether it made no difference which of two groups of rows came first."""
    return close(seen["ab"], seen["ba"], seen, dtype)


def is_mean(seen: dict[str, Any], dtype: Any = "float32") -> bool:
    """Whether what came of two groups of rows is the mean of what came of each.

    Args:
        seen: What came of the groups in `TRIED`.
        dtype: The type that it was rounded to.
    """
    return all(
        close(
            seen["a" + group],
            np.average([seen["a"], seen[group]], axis=0, weights=weights),
            seen,
            dtype,
        )
        for group in "bc"
        for weights in [[GROUPS["a"], GROUPS[group]]]
    )


def is_random(layer: keras.layers.Layer, first: Any, other: Any) -> bool:
    """Whether the groups do not tell, because rows are random or normalised with others.

    Args:
        layer: The layer.
        first: What came of a group of rows.
        other: What came of it with other seeds.
    """
    layers = _compat.all_layers(layer)
    by_shard = any(isinstance(one, keras.layers.BatchNormalization) for one in layers)
    return by_shard or not near(first, other)
