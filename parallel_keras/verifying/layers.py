"""Finds the first layer whose output differs when it sees a part of the rows only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.nests import tensors
from parallel_keras.shard import Shards, shard
from parallel_keras.verifying import findings

# What each layer returned, in the order in which they finished: inner ones first.
Trail = list[tuple[keras.layers.Layer, list[tf.Tensor]]]


def first_difference(
    template: keras.Model, inputs: Any, towers: int, training: bool, allowed: float
) -> tuple[str, str] | None:
    """Calls the model on the whole batch and on each part, and compares layer by layer.

    Args:
        template: The model. Nothing of it is changed.
        inputs: Nest of tensors, of shape `(batch_size, ...)`.
        towers: Int, the number of parts.
        training: Bool, the argument of that name.
        allowed: Float, the difference that rounding explains.

    Returns:
        The name of the layer and the likely kind, one of `findings`; `None` if each layer
        returns for each row what it returns for it in the whole batch.
    """
    shards = shard(inputs, towers)
    expected = _trail(template, inputs, training)
    parts, start = [], 0
    for part, rows in zip(shards.parts, map(int, shards.rows), strict=True):
        parts.append(_trail(template, part, training, (expected, slice(start, start + rows))))
        start += rows
    lengths = {len(trail) for trail in parts}
    if lengths != {len(expected)}:
        return None
    for (layer, outputs), *others in zip(expected, *parts, strict=True):
        columns = zip(outputs, *[theirs for _, theirs in others], strict=False)
        if any(_differs(value, column, shards, allowed) for value, *column in columns):
            return layer.name, kind_of(layer)
    return None


def kind_of(layer: keras.layers.Layer) -> str:
    """Why the output of a layer may be another one on several devices."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return findings.BY_SHARD
    held = vars(layer).values()
    if any(isinstance(value, keras.random.SeedGenerator) for value in held):
        return findings.RANDOM
    return findings.SEVERAL_ROWS


def _trail(
    template: keras.Model,
    inputs: Any,
    training: bool,
    whole: tuple[Trail, slice] | None = None,
) -> Trail:
    """What each layer returns.

    Args:
        template: The model.
        inputs: What it is called with.
        training: The argument of that name.
        whole: The trail of the whole batch, and which of its rows these are: layers that see
            all rows on several devices too get theirs from there. Defaults to none.
    """
    trail: Trail = []

    def noting(
        layer: keras.layers.Layer, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        outputs = call(*args, **kwargs)
        if whole is not None and getattr(layer, "synchronized", False):
            expected, rows = whole
            outputs = expected[len(trail)][1][0][rows]
        trail.append((layer, [leaf for leaf in tensors(outputs) if _is_eager(leaf)]))
        return outputs

    with contextlib.ExitStack() as stack:
        # Assignments go nowhere.
        stack.enter_context(keras.StatelessScope())
        for layer in _compat.all_layers(template):
            stack.enter_context(calling(layer, functools.partial(noting, layer, layer.call)))
        template(inputs, training=training)
    return trail


def _is_eager(leaf: Any) -> bool:
    return hasattr(leaf, "numpy")


def _differs(value: tf.Tensor, column: list[tf.Tensor], shards: Shards, allowed: float) -> bool:
    if not value.shape.rank or value.dtype == tf.string:
        return False
    sizes = [part.shape[0] if part.shape.rank else None for part in column]
    if value.shape[0] != shards.total or sizes != list(shards.rows):
        # No rows to compare, such as a table: it differs if the first part's does.
        first = column[0]
        return first.shape == value.shape and _far(value.numpy(), first.numpy(), allowed)
    if any(part.shape[1:] != value.shape[1:] for part in column):
        return True
    return _far(value.numpy(), np.concatenate([part.numpy() for part in column]), allowed)


def _far(one: np.ndarray, other: np.ndarray, allowed: float) -> bool:
    return relative(one, other) > allowed


def relative(one: Any, other: Any) -> float:
    """The largest difference of two arrays, relative to the largest value of the first.

    Args:
        one: Array.
        other: Array.

    Returns:
        A float; infinite where shapes differ, or one has numbers where the other has none.

    Example:
    >>> from parallel_keras.verifying import layers
    >>> layers.relative(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    0.25
    """
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind in "OSUb":
        return 0.0 if np.array_equal(one, other) else float("inf")
    wide = "complex128" if one.dtype.kind == "c" else "float64"
    one, other = one.astype(wide), other.astype(wide)
    same = (np.isnan(one) & np.isnan(other)) | (one == other)
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(one - other))
    if not apart.size:
        return 0.0
    if np.isnan(apart).any() or np.isinf(apart).any():
        return float("inf")
    size = np.abs(np.where(np.isfinite(one), one, 0.0)).max()
    return float(apart.max() / size) if size else float(apart.max())
