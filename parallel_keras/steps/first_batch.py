"""What the first batch of a data source looks like, before anything is trained."""

from __future__ import annotations

import types
from typing import Any

import keras
import tensorflow as tf

from parallel_keras.nests import is_ragged, of_any_rows, present, symbol


def first_batch(data: Any) -> tuple[Any, Any]:
    """The inputs of the first batch, and the data to go on with.

    Args:
        data: What `fit` takes as `x`: arrays, `tf.data.Dataset`, `PyDataset` or
            generator.

    Returns:
        Nest of `keras.KerasTensor`, `None` where they are not known without running
        the data source; and `data`, of which nothing is used up.

    Example:
    >>> import numpy as np
    >>> from parallel_keras.steps import first_batch
    >>> first_batch.first_batch({"a": np.ones((5, 3))})[0]["a"].shape
    (None, 3)
    """
    if isinstance(data, tf.data.Dataset):
        return _inputs(data.element_spec), data
    if isinstance(data, keras.utils.PyDataset):
        return _inputs(data[0]), data
    if isinstance(data, types.GeneratorType):
        first = next(data, None)
        return _inputs(first), _again(first, data)
    return _symbols(data), data


def _again(first: Any, rest: types.GeneratorType[Any, Any, Any]) -> Any:
    # A generator function, not a chain: Keras takes nothing else for a generator.
    if first is not None:
        yield first
    yield from rest


def _inputs(batch: Any) -> Any:
    return None if batch is None else _symbols(keras.utils.unpack_x_y_sample_weight(batch)[0])


def _symbols(nest: Any) -> Any:
    nest = present(nest)
    leaves = [leaf for leaf in keras.tree.flatten(nest) if leaf is not None]
    known = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") and _rank(leaf) for leaf in leaves]
    return keras.tree.map_structure(_symbol, nest) if leaves and all(known) else None


def _rank(leaf: Any) -> int:
    return tf.TensorShape(leaf.shape).rank or 0


def _symbol(leaf: Any) -> Any:
    if leaf is None:
        return None
    if is_ragged(leaf):
        return of_any_rows(leaf)  # Keras has no symbol of it
    of_leaf = symbol(leaf)
    return keras.KerasTensor((None, *of_leaf.shape[1:]), of_leaf.dtype, sparse=of_leaf.sparse)
