"""Outputs in parts, as the towers returned them, which the host joins with all its cores."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from parallel_keras import _compat

# Bytes; below, one thread is done before others have started.
_LARGE = 4 << 20
# Bytes; below, a step of a model with small outputs would take longer.
LARGE_ROW = 2048


@dataclasses.dataclass(eq=False)
class Parts:
    """One tensor in parts, rows in order: a leaf for Keras, and what TensorFlow can look into.

    Attributes:
        tensors: The parts, each of rank 1 at least.
    """

    tensors: tuple[tf.Tensor, ...]

    def __tf_flatten__(self) -> tuple[tuple[()], tuple[tuple[tf.Tensor, ...]]]:
        """What it holds, for TensorFlow."""
        return (), (self.tensors,)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: Any) -> Parts:
        """The inverse of `__tf_flatten__`."""
        del metadata
        return cls(*components)


def as_tensor(leaf: Any) -> Any:
    """A tensor in parts as one; anything else as it is."""
    if not isinstance(leaf, Parts):
        return leaf
    # Where there are GPUs, TensorFlow would join on one of them what is on the host.
    with tf.device(leaf.tensors[0].device):
        return tf.concat(leaf.tensors, axis=0)


def has_large_rows(tensor: tf.Tensor) -> bool:
    """Whether joining a tensor takes longer than handling its parts, as far as sizes are known.

    It is asked of rows, as their number is often known for the first batches only.

    Args:
        tensor: The tensor of one tower.
    """
    sizes = tensor.shape.as_list()[1:] if tensor.shape.rank else [0]
    numbers = math.prod(1 if size is None else size for size in sizes)
    return bool(numbers * tensor.dtype.size >= LARGE_ROW)


def joined(batches: Sequence[Parts]) -> Any:
    """The rows of some batches, as Keras' `predict` joins them, but by as many threads as parts.

    Merging on a device costs a pass over all outputs by one thread, and reading what is merged
    another.

    Args:
        batches: The parts of each batch.

    Returns:
        A `np.ndarray`; a `tf.RaggedTensor` where batches differ in other sizes than their rows.
    """
    arrays = [np.asarray(tensor) for parts in batches for tensor in parts.tensors]
    if len({array.shape[1:] for array in arrays}) > 1:
        return _compat.ragged_concat([as_tensor(parts) for parts in batches])
    if sum(array.nbytes for array in arrays) < _LARGE:
        return np.concatenate(arrays)
    ends = list(itertools.accumulate(len(array) for array in arrays))
    whole = np.empty((ends[-1], *arrays[0].shape[1:]), arrays[0].dtype)
    places = [whole[end - len(array) : end] for end, array in zip(ends, arrays, strict=True)]
    with ThreadPoolExecutor(min(len(arrays), os.cpu_count() or 1)) as pool:
        list(pool.map(np.copyto, places, arrays))  # Raises what a thread raised.
    return whole
