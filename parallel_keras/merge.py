"""From what the towers returned to one result. Pure: knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from parallel_keras import nests, slices
from parallel_keras.parts import Parts, has_large_rows

if TYPE_CHECKING:
    from parallel_keras.shard import Rows, Shards


def outputs(
    parts: Sequence[Any],
    shards: Shards,
    rules: Mapping[str, str] | None = None,
    found: Mapping[int, str] | None = None,
    *,
    in_parts: bool = False,
) -> Any:
    """Joins the outputs of the towers, rows in order: the inverse of `shard`.

    | leaf                         | merged as                                     |
    |------------------------------|-----------------------------------------------|
    | dense, ragged, sparse, string | concatenated by rows                         |
    | rank 0                       | mean weighted by rows, or as `rules` says     |
    | `None`, Python values, text of rank 0 | the first tower's                    |

    Args:
        parts: Sequence of nests, one for each tower, all of one structure.
        shards: The `Shards` that the towers were given.
        rules: Mapping from the name of an output (the last key of its path) to
            `"pad"` (fill the parts up with zeros to the largest size),
            `"whole"` (the same on every tower: take the first), `"mean"` or
            `"sum"` (rank 0 only). Defaults to none.
        found: Mapping from the number of a leaf to the rule that was found for it: one of
            those, `"max"` or `"min"` (rank 0 only). Defaults to none.
        in_parts: Whether dense leaves with large rows are not concatenated, but become `Parts`;
            none does where Keras does not see all of the nest. Defaults to `False`.

    Returns:
        A nest of the structure of one part.

    Raises:
        ValueError: If parts differ in a size other than rows, or an output has
            a first axis that is not the batch.

    Example:
    >>> import numpy as np
    >>> from parallel_keras import merge, shard
    >>> shards = shard.shard(np.arange(5), 2)
    >>> merge.outputs(shards.parts, shards).numpy().tolist()
    [0, 1, 2, 3, 4]
    """
    if len(parts) == 1:
        return parts[0]
    flat = [nests.flatten_with_paths(part) for part in parts]
    paths = [path for path, _ in flat[0]]
    columns = zip(*[[leaf for _, leaf in leaves] for leaves in flat], strict=True)
    in_parts = in_parts and not nests.knows_more(parts[0])
    merged = [
        _join(
            list(column),
            shards,
            _name(path),
            (rules or {}).get(_last(path), (found or {}).get(index)),
            in_parts=in_parts,
        )
        for index, (path, column) in enumerate(zip(paths, columns, strict=True))
    ]
    return nests.packed(parts[0], merged)


def mean(values: Sequence[tf.Tensor], shares: Sequence[tf.Tensor]) -> tf.Tensor:
    """Mean of one value from each tower, weighted by their shares of the batch.

    Args:
        values: Sequence of tensors of one shape.
        shares: Sequence of float tensors of shape `()` that add up to 1.

    Returns:
        A tensor of the shape and dtype of the values. It is computed in at
        least float32, so that half precision loses nothing by it; integers are
        rounded, and equal ones stay what they are, however large.
    """
    if len(values) == 1:
        return values[0]
    dtype = values[0].dtype
    if not (dtype.is_floating or dtype.is_complex):
        first = tf.cast(values[0], tf.int64)
        apart = [tf.cast(tf.cast(value, tf.int64) - first, tf.float64) for value in values]
        return tf.cast(first + tf.cast(tf.round(mean(apart, shares)), tf.int64), dtype)
    wide = dtype if dtype in (tf.float64, tf.complex64, tf.complex128) else tf.float32
    terms = [
        tf.math.multiply_no_nan(tf.cast(value, wide), tf.cast(share, wide))
        for value, share in zip(values, shares, strict=True)
    ]
    return tf.cast(tf.add_n(terms), dtype)


def live_sum(values: Sequence[tf.Tensor], shares: Sequence[tf.Tensor]) -> tf.Tensor:
    """Sum of one value from each tower that has a share of the batch.

    Args:
        values: Sequence of tensors of one shape.
        shares: Their shares of the batch.

    Returns:
        A tensor like one value.
    """
    if len(values) == 1:
        return values[0]
    pairs = zip(values, shares, strict=True)
    return tf.add_n([tf.where(share > 0, value, tf.zeros_like(value)) for value, share in pairs])


def largest(values: Sequence[tf.Tensor | None]) -> tf.Tensor | None:
    """The largest of one value from each tower, by element.

    Args:
        values: Sequence of tensors of one shape, or `None` for towers that have none.

    Returns:
        A tensor, `None` if all values are.
    """
    present = [value for value in values if value is not None]
    return tf.reduce_max(tf.stack(present), axis=0) if present else None


def total(values: Sequence[Any]) -> Any:
    """Sum of one gradient from each tower.

    Sparse gradients (`tf.IndexedSlices`, from embeddings) stay sparse, and have the slices
    that they have on one device, see `slices.total`.

    Args:
        values: Sequence of tensors, `tf.IndexedSlices`, dicts of them by kind, or `None` for
            towers that the weight does not reach.

    Returns:
        A tensor, a `tf.IndexedSlices`, or `None` if all values are.
    """
    present = [value for value in values if value is not None]
    if not present:
        return None
    if all(slices.is_sparse(value) for value in present):
        return slices.total(present)
    return present[0] if len(present) == 1 else tf.add_n([slices.dense(v) for v in present])


def increments(old: tf.Tensor, new: Sequence[tf.Tensor], shares: Sequence[tf.Tensor]) -> tf.Tensor:
    """Adds up what each tower added: for counters of rows and metric state.

    Args:
        old: The value that every tower started from.
        new: Sequence of the values that the towers ended with.
        shares: Their shares of the batch; a tower with share 0 adds nothing.

    Returns:
        A tensor like `old`.

    Example: two towers that saw 3 and 2 rows on top of 10.

    >>> from parallel_keras import merge
    >>> int(merge.increments(tf.constant(10), [tf.constant(13), tf.constant(12)], [0.6, 0.4]))
    15
    """
    if len(new) == 1:
        return new[0]
    if old.dtype == tf.bool:
        return tf.reduce_any(
            [value & (share > 0) for value, share in zip(new, shares, strict=True)], axis=0
        )
    return old + live_sum([value - old for value in new], shares)


def extreme(values: Sequence[tf.Tensor], kind: str) -> tf.Tensor:
    """The largest or smallest of one value from each tower, or whether any or all are true.

    Args:
        values: Sequence of tensors of one shape. That of a tower without rows is another one's.
        kind: `"max"` or `"min"`.

    Returns:
        A tensor like one value.

    Example:
    >>> from parallel_keras import merge
    >>> merge.extreme([tf.constant([1, 4]), tf.constant([3, 2])], "max").numpy().tolist()
    [3, 4]
    """
    if values[0].dtype == tf.bool:
        pick = tf.reduce_any if kind == "max" else tf.reduce_all
    else:
        pick = tf.reduce_max if kind == "max" else tf.reduce_min
    return pick(tf.stack(values), axis=0)


def moving_moments(
    means: Sequence[Sequence[tf.Tensor]],
    variances: Sequence[tf.Tensor],
    shares: Sequence[tf.Tensor],
    momentum: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Moving statistics of the whole batch from those of its shards.

    Each tower moved its statistics towards the mean and variance of its own
    shard. The variance of the whole batch is the mean of the shards' variances
    plus the variance of their means (law of total variance). An update shrinks
    the distance of two means by `1 - momentum`, and later updates (of a layer
    that is called several times in one step) shrink it by `momentum` each.

    Args:
        means: For each tower the sequence that its moving mean went through, the
            value before the step first; tensors of shape `(channels,)`.
        variances: The moving variance that each tower ended with, `(channels,)`.
        shares: Their shares of the batch.
        momentum: Float, the layer's momentum.

    Returns:
        The moving mean and the moving variance as the same updates on the whole
        batch would have left them.
    """
    history = [mean(values, shares) for values in zip(*means, strict=True)]
    variance = mean(variances, shares)
    if len(means) == 1 or momentum == 1:
        return history[-1], variance
    for update in range(1, len(history)):
        steps = [
            (values[update] - history[update])
            - momentum * (values[update - 1] - history[update - 1])
            for values in means
        ]
        spread = mean([tf.square(step) for step in steps], shares)
        variance += momentum ** (len(history) - 1 - update) * spread / (1 - momentum)
    return history[-1], variance


def _join(column: list[Any], shards: Shards, name: str, rule: str | None, *, in_parts: bool) -> Any:
    first = column[0]
    if isinstance(first, (int, float)) and rule in ("sum", "max", "min"):
        return sum(column) if rule == "sum" else max(column) if rule == "max" else min(column)
    if not tf.is_tensor(first) or rule == "whole":
        return first
    if first.shape.rank == 0:
        return _join_scalars(column, shards, rule)
    checks = [] if rule == "pad" else _check_sizes(column, shards, name)
    column = _pad(column) if rule == "pad" else column
    # Without this order the concatenation fails first, with a message that names nothing.
    with tf.control_dependencies(checks):
        kept = [_drop_stand_in(v, r) for v, r in zip(column, shards.rows, strict=True)]
        if checks:
            kept = [tf.nest.map_structure(tf.identity, v, expand_composites=True) for v in kept]
        if isinstance(first, tf.SparseTensor):
            return tf.sparse.concat(0, kept, expand_nonconcat_dims=rule == "pad")
        if in_parts and isinstance(first, tf.Tensor) and has_large_rows(first):
            return Parts(tuple(map(tf.identity, kept)))
        return tf.concat(kept, axis=0)


def _join_scalars(column: list[tf.Tensor], shards: Shards, rule: str | None) -> tf.Tensor:
    if column[0].dtype == tf.string:  # A constant, as nothing makes one text of several rows.
        return column[0]
    if rule in ("max", "min"):
        return extreme(column, rule)
    return (live_sum if rule == "sum" else mean)(column, shards.shares())


def _drop_stand_in(value: Any, rows: Rows) -> Any:
    """Takes away what came from a row that only stood in for none."""
    if isinstance(rows, int) and rows:
        return value
    if isinstance(value, tf.SparseTensor):
        size = tf.where(rows > 0, value.dense_shape[0], tf.zeros([], tf.int64))
        extent = tf.concat([[size], value.dense_shape[1:]], axis=0)
        kept = tf.sparse.slice(value, tf.zeros_like(extent), extent)
        kept.set_shape([None, *value.shape[1:]])
        return kept
    length = value.nrows() if isinstance(value, tf.RaggedTensor) else tf.shape(value)[0]
    return value[: tf.where(rows > 0, length, tf.zeros_like(length))]


def _pad(column: list[Any]) -> list[Any]:
    """Fills every part up to the largest size; sparse ones are when they are joined."""
    if isinstance(column[0], tf.SparseTensor):
        return column
    if isinstance(column[0], tf.RaggedTensor):
        values = _pad([value.flat_values for value in column])
        return [old.with_flat_values(new) for old, new in zip(column, values, strict=True)]
    shapes = [tf.shape(value) for value in column]
    largest = tf.reduce_max(tf.stack(shapes), axis=0)
    grow = [tf.concat([[0], (largest - shape)[1:]], axis=0) for shape in shapes]
    return [
        tf.pad(value, tf.stack([tf.zeros_like(by), by], axis=1))
        for value, by in zip(column, grow, strict=True)
    ]


def _check_sizes(column: list[Any], shards: Shards, name: str) -> list[tf.Operation]:
    """Fails with the output's name where a concatenation would be wrong or fail without it."""
    shapes, each = [value.shape for value in column], None
    for shape, rows in zip(shapes, shards.rows, strict=True):
        length = shape[0] if shape.rank else None
        if length is None:
            continue
        known = isinstance(rows, int)
        each = length / max(rows, 1) if each is None and known else each
        if not known or length % max(rows, 1) or (rows and length / rows != each):
            raise ValueError(
                f"Expected the first axis of {name} to be the batch. Received: shape={shape} from "
                f"a tower with {rows if isinstance(rows, int) else 'a varying number of'} rows. "
                'If it is the same for every row, declare it: rules={"output name": "whole"}.'
            )
    mismatch = (
        "Expected {} to have the same size on every tower, but for rows. Received: shapes={}. "
    )
    remedy = 'Declare how to join it: DataParallelModel(..., rules={"output name": "pad"}).'
    inner = [_inner_shape(value) for value in column]
    if not all(shape.is_compatible_with(inner[0]) for shape in inner):
        raise ValueError(mismatch.format(name, [tuple(shape) for shape in shapes]) + remedy)
    if all(shape.is_fully_defined() for shape in inner):
        return []
    sizes = tf.stack([_inner_sizes(value) for value in column])
    check = tf.debugging.assert_equal(
        sizes,
        tf.broadcast_to(sizes[:1], tf.shape(sizes)),
        message=mismatch.format(name, "below, a line for each tower") + remedy,
    )
    return [] if check is None else [check]


def _inner_shape(value: Any) -> tf.TensorShape:
    """What must be the same on every tower, as far as it is known: the ragged axes need not."""
    return (value.flat_values if isinstance(value, tf.RaggedTensor) else value).shape[1:]


def _inner_sizes(value: Any) -> tf.Tensor:
    if isinstance(value, tf.SparseTensor):
        return value.dense_shape[1:]
    return tf.shape(value.flat_values if isinstance(value, tf.RaggedTensor) else value)[1:]


def _name(path: tuple[Any, ...]) -> str:
    return f"output {'/'.join(str(key) for key in path)}" if path else "the output"


def _last(path: tuple[Any, ...]) -> str:
    return str(path[-1]) if path else "output"
