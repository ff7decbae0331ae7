"""Sparse gradients of several towers as the one that a single device would have. Pure.

Optimizers do more with a gradient than to add it up: they square and clip it, slice by slice. So
slices that a single device has once must not come once from each tower.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import tensorflow as tf

# Every tower has slices of its own, as a lookup of words has: put one after the other.
ROWS = "rows"
# Every tower has the slices of the same rows in the same order, as a table of positions: added up.
SAME = "same"
# Every tower has each row at most once, and so has one device: those of one row are added up.
UNIQUE = "unique"

# The slices of one tower, apart by what to do with them. A bare `tf.IndexedSlices` is all `ROWS`.
ByKind: TypeAlias = Mapping[str, tf.IndexedSlices]
Sparse: TypeAlias = tf.IndexedSlices | ByKind


def is_sparse(gradient: object) -> bool:
    """Whether a gradient of a tower is sparse, taken apart by kind or not."""
    return isinstance(gradient, (tf.IndexedSlices, Mapping))


def all_sparse(gradients: Sequence[object]) -> bool:
    """Whether there are gradients, and all of them sparse, but for towers without any."""
    present = [gradient for gradient in gradients if gradient is not None]
    return bool(present) and all(map(is_sparse, present))


def joined(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """Slices, one after the other.

    Args:
        parts: Sequence of slices of one weight.

    Returns:
        A `tf.IndexedSlices`.
    """
    if len(parts) == 1:
        return parts[0]
    return tf.IndexedSlices(
        tf.concat([part.values for part in parts], axis=0),
        tf.concat([part.indices for part in parts], axis=0),
        parts[0].dense_shape,
    )


def total(gradients: Sequence[Sparse]) -> tf.IndexedSlices:
    """Sum of one sparse gradient from each tower, with the slices that one device has.

    Args:
        gradients: Sequence of `tf.IndexedSlices`, or of dicts of them by kind.

    Returns:
        A `tf.IndexedSlices`.

    Example: two towers that both look up rows 0 and 1 of a table, for their rows of the batch.

    >>> import tensorflow as tf
    >>> from parallel_keras import slices
    >>> towers = [tf.IndexedSlices(tf.ones([2, 1]), tf.constant([0, 1])) for _ in range(2)]
    >>> slices.total([{slices.SAME: tower} for tower in towers]).indices.numpy().tolist()
    [0, 1]
    >>> slices.total(towers).indices.numpy().tolist()
    [0, 1, 0, 1]
    """
    columns: dict[str, list[tf.IndexedSlices]] = {}
    for gradient in gradients:
        parts = gradient if isinstance(gradient, Mapping) else {ROWS: gradient}
        for kind, part in parts.items():
            columns.setdefault(kind, []).append(part)
    merge = {ROWS: joined, SAME: _added, UNIQUE: _by_index}
    return joined([merge[kind](parts) for kind, parts in columns.items()])


def dense(gradient: object) -> tf.Tensor:
    """A gradient of any kind as a tensor."""
    return tf.convert_to_tensor(total([gradient]) if is_sparse(gradient) else gradient)


def _added(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """The sum of slices that are of the same rows, in the same order."""
    if len(parts) == 1:
        return parts[0]
    if all(part.indices.shape.is_fully_defined() for part in parts):
        return _in_order(parts)
    # Towers whose ragged rows were filled up to the longest of their own have other lengths.
    sizes = tf.stack([tf.size(part.indices) for part in parts])
    first = parts[0]
    values, indices = tf.cond(
        tf.reduce_all(tf.equal(sizes, sizes[0])),
        lambda: _flat(_in_order(parts)),
        lambda: _flat(_by_index(parts)),
    )
    values.set_shape([None, *first.values.shape[1:]])
    return tf.IndexedSlices(values, indices, first.dense_shape)


def _in_order(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    values = tf.add_n([part.values for part in parts])
    return tf.IndexedSlices(values, parts[0].indices, parts[0].dense_shape)


def _by_index(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """The sum of slices, each row once."""
    if len(parts) == 1:
        return parts[0]
    several = joined(parts)
    indices, place = tf.unique(several.indices)
    values = tf.math.unsorted_segment_sum(several.values, place, tf.size(indices))
    return tf.IndexedSlices(values, indices, several.dense_shape)


def _flat(part: tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor]:
    return part.values, part.indices
