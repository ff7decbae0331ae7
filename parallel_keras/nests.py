"""Nests of tensors: what is in them, and the same nest with something else in it."""

from __future__ import annotations

import copy
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def flatten_with_paths(nest: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a nest with the keys that lead to them.

    As `keras.tree.flatten_with_path`, but it also looks into what TensorFlow takes for a nest
    and Keras for a leaf: subclasses of dicts, `attrs` classes, dataclasses with
    `__tf_flatten__`, and `tf.experimental.ExtensionType`.

    Args:
        nest: Nest of anything.

    Returns:
        A list of pairs, in order.

    Example:
    >>> from parallel_keras import nests
    >>> nests.flatten_with_paths({"b": 1, "a": [None, 2]})
    [(('a', 0), None), (('a', 1), 2), (('b',), 1)]
    """
    children = _children(nest)
    if children is None:
        return [((), nest)]
    return [
        ((key, *path), leaf) for key, child in children for path, leaf in flatten_with_paths(child)
    ]


def knows_more(nest: Any) -> bool:
    """Whether a nest holds classes that TensorFlow looks into, and Keras does not.

    Args:
        nest: Nest of anything.

    Returns:
        Bool.

    Example:
    >>> import collections
    >>> from parallel_keras import nests
    >>> class Output(collections.OrderedDict):
    ...     pass
    >>> nests.knows_more([Output(a=1)]), nests.knows_more([{"a": 1}])
    (True, False)
    """
    return any(_children(leaf) is not None for leaf in keras.tree.flatten(nest))


def packed(nest: Any, leaves: Iterable[Any]) -> Any:
    """The inverse of `flatten_with_paths`.

    Args:
        nest: The nest whose structure is meant.
        leaves: What to put there, in order.

    Returns:
        A nest of the same classes.
    """
    return _packed(nest, iter(leaves))


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with what a function returns for each leaf of `flatten_with_paths`."""
    return packed(nest, [function(leaf) for _, leaf in flatten_with_paths(nest)])


def _packed(nest: Any, leaves: Iterator[Any]) -> Any:
    children = _children(nest)
    if children is None:
        return next(leaves)
    return _rebuilt(nest, {key: _packed(child, leaves) for key, child in children})


def _children(nest: Any) -> list[tuple[Any, Any]] | None:
    """What is in a node of a nest by key, `None` for a leaf."""
    if isinstance(nest, Mapping):
        return _items(nest)
    if isinstance(nest, (list, tuple)):
        return list(enumerate(nest))
    if isinstance(nest, type):
        return None
    if hasattr(nest, "__tf_flatten__"):
        return list(enumerate(nest.__tf_flatten__()[1]))
    names: Iterable[str] = ()
    if isinstance(nest, tf.experimental.ExtensionType):
        names = [name for name in typing.get_type_hints(type(nest)) if name in vars(nest)]
    elif hasattr(type(nest), "__attrs_attrs__"):
        names = [field.name for field in type(nest).__attrs_attrs__]
    return [(name, getattr(nest, name)) for name in names] or None


def _items(nest: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Those of a dict in the order of Keras, which sorts the keys where it can."""
    if isinstance(nest, OrderedDict):
        return list(nest.items())
    try:
        return sorted(nest.items(), key=lambda item: item[0])
    except TypeError:
        return list(nest.items())


def _rebuilt(nest: Any, children: dict[Any, Any]) -> Any:
    """A node of the same class with other children."""
    values = list(children.values())
    if isinstance(nest, Mapping):
        same = copy.copy(nest)
        if not hasattr(same, "__setitem__"):
            return children
        for key, value in children.items():
            same[key] = value
        return same
    if isinstance(nest, tuple) and hasattr(nest, "__match_args__"):  # a named tuple
        return nest.__class__(*values)
    if isinstance(nest, (list, tuple)):
        return nest.__class__(values)
    if hasattr(nest, "__tf_unflatten__"):
        return type(nest).__tf_unflatten__(nest.__tf_flatten__()[0], tuple(values))
    # Neither a check of its own nor that nothing may be set there applies to what is only cut.
    same = object.__new__(type(nest))
    kept = vars(nest).items() if hasattr(nest, "__dict__") else ()
    static = {} if isinstance(nest, tf.experimental.ExtensionType) else dict(kept)
    for name, value in {**static, **children}.items():
        object.__setattr__(same, name, value)
    return same


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
    return not any(isinstance(leaf, _COMPOSITE) for _, leaf in flatten_with_paths(nest))


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
    known = isinstance(leaf, keras.KerasTensor) and leaf.sparse
    sparse = known or isinstance(leaf, (tf.SparseTensor, tf.SparseTensorSpec))
    dtype = keras.backend.standardize_dtype(getattr(leaf.dtype, "name", leaf.dtype))
    return keras.KerasTensor(tuple(leaf.shape), dtype, sparse=sparse)


def symbols(nest: Any) -> Any:
    """The nest with a `symbol` for each leaf."""
    return mapped(symbol, nest)


def is_ragged(leaf: Any) -> bool:
    """Whether a leaf is a ragged tensor, or its spec."""
    return isinstance(leaf, (tf.RaggedTensor, tf.RaggedTensorSpec))


def of_any_rows(leaf: Any) -> Any:
    """What a ragged or sparse tensor is made by, without the number of its rows."""
    if isinstance(leaf, tf.RaggedTensor):
        shape = [None, *leaf.shape[1:]]
        return tf.RaggedTensorSpec(shape, leaf.dtype, leaf.ragged_rank, leaf.row_splits.dtype)
    if isinstance(leaf, tf.RaggedTensorSpec):
        shape = [None, *leaf.shape[1:]]
        return tf.RaggedTensorSpec(shape, leaf.dtype, leaf.ragged_rank, leaf.row_splits_dtype)
    if isinstance(leaf, tf.SparseTensor):
        return tf.SparseTensorSpec([None, *leaf.shape[1:]], leaf.dtype)
    return leaf
