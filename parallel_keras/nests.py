"""Nests of tensors: what is in them, and the same nest with something else in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat

_COMPOSITE = (tf.SparseTensor, tf.RaggedTensor, tf.SparseTensorSpec, tf.RaggedTensorSpec)


def flatten(nest: Any) -> list[Any]:
    """The leaves of a nest, ragged and sparse tensors taken apart."""
    return tf.nest.flatten(nest, expand_composites=True)


def tensors(nest: Any) -> list[tf.Tensor]:
    """The tensors and arrays of a nest, also those inside of ragged and sparse ones.

    Args:
        nest: Nest of anything.

    Returns:
        A list, in order.

    Example:
    >>> from parallel_keras import nests
    >>> len(nests.tensors({"a": tf.zeros(2), "b": [None, tf.ragged.constant([[1], [2, 3]])]}))
    3
    """
    return [leaf for leaf in flatten(nest) if is_tensor(leaf)]


def floats(nest: Any) -> list[tf.Tensor]:
    """The float tensors of a nest, also those inside of ragged and sparse ones."""
    return [leaf for leaf in flatten(nest) if is_float(leaf)]


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor or an array."""
    return tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a tensor that a gradient can flow to."""
    return tf.is_tensor(leaf) and leaf.dtype.is_floating


def replaced(nest: Any, others: Iterable[Any], which: Callable[[Any], bool] = is_tensor) -> Any:
    """The nest with some of its leaves replaced.

    Args:
        nest: Nest of anything.
        others: What to put there, in the order of the leaves that are replaced. Rows of
            ragged and sparse tensors may be others than before.
        which: Function that tells which leaves are. Defaults to all tensors, the inverse
            of `tensors`.

    Returns:
        A nest like it.
    """
    news = iter(others)
    flat = [next(news) if which(leaf) else leaf for leaf in flatten(nest)]
    like = tf.nest.map_structure(of_any_rows, nest)
    return tf.nest.pack_sequence_as(like, flat, expand_composites=True)


def is_dense(nest: Any) -> bool:
    """Whether all tensors of a nest, or what their specs stand for, are dense.

    Args:
        nest: Nest of tensors or of `tf.TypeSpec`.

    Returns:
        Bool.

    Example:
    >>> from parallel_keras import nests
    >>> nests.is_dense([tf.zeros(3), tf.SparseTensorSpec([3])])
    False
    """
    return not any(isinstance(leaf, _COMPOSITE) for leaf in keras.tree.flatten(nest))


def is_absent(spec: Any) -> bool:
    """Whether a spec stands for `None`: an optional input that a batch does without.

    Args:
        spec: A leaf of the spec of a data set.

    Returns:
        Bool.

    Example:
    >>> from parallel_keras import nests
    >>> data = tf.data.Dataset.from_tensors({"a": tf.zeros(3), "b": None})
    >>> nests.is_absent(data.element_spec["b"]), nests.is_absent(data.element_spec["a"])
    (True, False)
    """
    # Keras turns arrays beside a `None` into batches with an optional value that is never there.
    return isinstance(spec, tf.OptionalSpec) or _compat.is_none_spec(spec)


def present(spec: Any) -> Any:
    """The spec of a batch, with `None` for what stands for it.

    Args:
        spec: Nest of `tf.TypeSpec`.

    Returns:
        A nest like it.
    """
    return keras.tree.map_structure(lambda leaf: None if is_absent(leaf) else leaf, spec)


def symbol(leaf: Any) -> Any:
    """What Keras knows of a tensor before there is one.

    Args:
        leaf: Tensor, array or `tf.TypeSpec`; anything else is left as it is.

    Returns:
        A `keras.KerasTensor`, or the leaf.

    Example:
    >>> import numpy as np
    >>> from parallel_keras import nests
    >>> nests.symbol(np.ones((2, 3), "float32")).shape
    (2, 3)
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    sparse = isinstance(leaf, (tf.SparseTensor, tf.SparseTensorSpec))
    dtype = keras.backend.standardize_dtype(getattr(leaf.dtype, "name", leaf.dtype))
    return keras.KerasTensor(tuple(leaf.shape), dtype, sparse=sparse)


def symbols(nest: Any) -> Any:
    """The nest with a `symbol` for each leaf."""
    return keras.tree.map_structure(symbol, nest)


def of_any_rows(leaf: Any) -> Any:
    """What a ragged or sparse tensor is made by, without the number of its rows."""
    if isinstance(leaf, tf.RaggedTensor):
        shape = [None, *leaf.shape[1:]]
        return tf.RaggedTensorSpec(shape, leaf.dtype, leaf.ragged_rank, leaf.row_splits.dtype)
    if isinstance(leaf, tf.SparseTensor):
        return tf.SparseTensorSpec([None, *leaf.shape[1:]], leaf.dtype)
    return leaf
