"""One batch, as a step gets it, from whatever `fit` takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras.explaining import stopwatch

Data = tuple[Any, Any, Any]


def first_of(batch: Any) -> Data:
    """Inputs, targets and sample weights of one batch.

    Args:
        batch: A tuple of nests of arrays or tensors, or a batched `tf.data.Dataset` or a
            `keras.utils.PyDataset`, whose first batch is taken.

    Returns:
        A tuple of nests of tensors, `None` for what is not there.
    """
    return read(batch, 0)[0]


def read(batch: Any, repeats: int) -> tuple[Data, float | None]:
    """The first batch, and the mean milliseconds to read one after it.

    Args:
        batch: As in `first_of`.
        repeats: Int, how many more batches are read to find out; none for `0`.

    Returns:
        The batch, and the milliseconds, `None` where it is not read from anything.
    """
    if isinstance(batch, tf.data.Dataset):
        source: Iterator[Any] = iter(batch.repeat())
    elif isinstance(batch, keras.utils.PyDataset):
        source = (batch[index % len(batch)] for index in itertools.count())
    else:
        return _as_data(batch), None
    first = next(source)
    if not repeats:
        return _as_data(first), None
    # The mean, because a dataset that reads ahead gives some at once and others late.
    start = stopwatch.now()
    for _ in range(repeats):
        next(source)
    return _as_data(first), 1000 * (stopwatch.now() - start) / repeats


def _as_data(batch: Any) -> Data:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64:
            leaf = leaf.astype(keras.config.floatx())  # as fit does
        is_tensor = tf.is_tensor(leaf) or leaf is None
        return leaf if is_tensor else tf.convert_to_tensor(leaf)

    if isinstance(batch, list):
        batch = tuple(batch)
    with tf.device("/CPU:0"):
        return keras.tree.map_structure(convert, keras.utils.unpack_x_y_sample_weight(batch))
