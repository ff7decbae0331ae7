"""What workers feed: the same batches, or each its own rows. Pure: knows nothing of models."""

from typing import Any

import numpy as np
import tensorflow as tf

# Of each row so many numbers go into a mark.
_SAMPLE = 16
_BUCKETS = 1 << 20
# Images may be decoded a little differently on other processors; other rows differ by far more.
_TOLERANCE = 1e-4


def mark(batch: Any) -> tf.Tensor:
    """A few numbers that differ between batches of different rows, or in another order.

    Args:
        batch: Nest of tensors.

    Returns:
        A float32 tensor of shape `(3,)`: the rows, a weighted sum over a sample of the
        numbers, and its size.
    """
    number, size, rows = tf.zeros([]), tf.zeros([]), tf.zeros([])
    for leaf in tf.nest.flatten(batch, expand_composites=True):
        if not (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)) or not leaf.shape:
            continue
        values = tf.convert_to_tensor(leaf)
        rows = tf.cast(tf.shape(values)[0], tf.float32)
        values = tf.reshape(values, [tf.shape(values)[0], tf.reduce_prod(tf.shape(values)[1:])])
        sample = values[:, :: tf.maximum(tf.shape(values)[1] // _SAMPLE, 1)]
        if sample.dtype == tf.string:
            sample = tf.strings.to_hash_bucket_fast(sample, _BUCKETS)
        sample = tf.cast(sample, tf.float32)
        at = tf.range(tf.shape(sample)[0], dtype=tf.float32)[:, None]
        across = tf.range(tf.shape(sample)[1], dtype=tf.float32)[None]
        weighted = sample * tf.sin(1.0 + at + 0.1 * across)
        number += tf.reduce_sum(weighted)
        size += tf.reduce_sum(tf.abs(weighted))
    return tf.stack([rows, number, size])


def check_marks(marks: list[Any], workers: Any) -> None:
    """Fails where the workers were fed different batches.

    Args:
        marks: For each tower of all workers the `mark` of its batch, or `None`.
        workers: The `Workers`, for the message.

    Raises:
        tf.errors.InvalidArgumentError: When the step runs.
    """
    if marks[0] is None:
        return
    found = tf.stack(marks)
    rows, number, size = tf.unstack(found, axis=1)
    away = tf.abs(number - number[0]) > _TOLERANCE * size[0]
    tf.debugging.Assert(
        tf.reduce_all(tf.equal(rows, rows[0]) & ~away),
        [
            "The workers were fed different batches, but each must feed the same ones in the same "
            "order and take its own rows. Expected: the same rows, sum and size (below) on all "
            f"{workers.size} workers. Received, a line for each tower of all workers: ",
            found,
            "Give every shuffle a seed, or call keras.utils.set_random_seed(0) at the top of the "
            "script. If each worker is to feed rows of its own, say so: "
            'DataParallelModel(..., rules={"batch": "own"}).',
        ],
        summarize=-1,
    )


def fill(batch: Any) -> tuple[Any, tf.Tensor]:
    """Gives a batch of no rows one of zeros, so that a tower can stand in.

    Args:
        batch: Nest of dense tensors.

    Returns:
        The batch, and an int32 tensor `()`: 0 if there were no rows, else 1.
    """
    leaves = [leaf for leaf in tf.nest.flatten(batch) if tf.is_tensor(leaf) and leaf.shape.rank]
    some = tf.shape(leaves[0])[0] > 0

    def filled(leaf: Any) -> Any:
        if not tf.is_tensor(leaf) or not leaf.shape.rank:
            return leaf
        missing = tf.cast(~some, tf.int32)
        inner = tf.shape(leaf)[1:]
        full = tf.cond(
            some,
            lambda: leaf,
            lambda: tf.zeros(tf.concat([[missing], inner], axis=0), leaf.dtype),
        )
        full.set_shape([None, *leaf.shape[1:]])
        return full

    return tf.nest.map_structure(filled, batch), tf.cast(some, tf.int32)


def check_dense(batch: Any) -> None:
    """Refuses batches that cannot be put together from the rows of all workers.

    Args:
        batch: Nest of tensors.

    Raises:
        ValueError: If a tensor is ragged, sparse or of strings.
    """
    for leaf in tf.nest.flatten(batch):
        composite = isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor))
        if composite or (tf.is_tensor(leaf) and leaf.dtype == tf.string):
            raise ValueError(
                "Expected dense numbers where each worker feeds its own rows, because this step "
                "needs the rows of all workers. "
                f"Received: a {type(leaf).__name__} of dtype={leaf.dtype.name}. "
                'Feed the same batches on all workers (leave out rules={"batch": "own"}).'
            )
