"""From one batch to one shard for each tower. Pure: knows nothing of models."""

from collections.abc import Collection
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from parallel_keras import nests

# An int where the batch size is known while tracing, else an int32 tensor of shape ().
Rows: TypeAlias = Any
_UNCUT = 'rules={"batch": "whole"}'


class Shards(NamedTuple):
    """A batch cut by rows.

    Attributes:
        parts: One nest for each tower, of the structure of the batch.
        rows: How many rows of the batch each part holds, ints where the batch
            size is known while tracing, else int32 tensors of shape `()`.
            0 marks a part that only stands in for rows that do not exist.
        total: The rows of the whole batch, an int or an int32 tensor.
    """

    parts: list[Any]
    rows: list[Rows]
    total: Rows

    def shares(self) -> list[tf.Tensor]:
        """The part of the batch that each tower holds; they add up to 1.

        Returns:
            A list of float64 tensors of shape `()`, precise enough for any dtype.
        """
        total = tf.cast(self.total, tf.float64)
        return [tf.cast(rows, tf.float64) / total for rows in self.rows]


def row_counts(rows: int, towers: int) -> list[int]:
    """How many rows each tower gets: sizes differ by at most 1, none is 0.

    | rows | towers | counts     |
    |------|--------|------------|
    | 8    | 4      | 2, 2, 2, 2 |
    | 10   | 4      | 3, 3, 2, 2 |
    | 3    | 4      | 1, 1, 1    |

    Args:
        rows: Int, the rows of the batch.
        towers: Int, the number of towers, at least 1.

    Returns:
        A list of `min(rows, towers)` ints that add up to `rows`.

    Example:
    >>> from parallel_keras import shard
    >>> shard.row_counts(10, 4)
    [3, 3, 2, 2]
    >>> shard.row_counts(3, 4)
    [1, 1, 1]
    """
    base, extra = divmod(rows, towers)
    return [base + 1] * extra + ([base] * (towers - extra) if base else [])


def shard(
    batch: Any, towers: int, whole: Collection[str] = (), here: range | None = None
) -> Shards:
    """Cuts a nest of tensors by rows, one part for each tower.

    Every leaf with a row axis is cut: dense, ragged, sparse and string tensors.
    Leaves without one (`None`, rank-0 tensors, Python values) and those named
    in `whole` go to every tower as they are.

    Where the number of rows is known while tracing, there are as many parts as
    towers can have a row, so none for a batch without rows. Where it is not,
    there are always `towers` parts, and a tower without rows gets a copy of the
    last row, marked by `rows` 0: a model must never see an empty batch, because
    normalisation layers and means turn it into NaN.

    Args:
        batch: Nest (dict, list, tuple, named tuple, `None`) of tensors.
        towers: Int, the number of towers.
        whole: Names of leaves that every tower gets whole: the last key of the
            leaf's path. Defaults to none.
        here: Which towers belong to this worker: only they get parts, all of them,
            also those without rows. Defaults to `None`, where there are no others.

    Returns:
        The `Shards`.

    Raises:
        ValueError: If leaves have different numbers of rows, or no leaf has any.

    Example:
    >>> import numpy as np
    >>> from parallel_keras import shard
    >>> parts, rows, total = shard.shard({"x": np.arange(5), "y": None}, 2)
    >>> [part["x"].numpy().tolist() for part in parts], rows, total
    ([[0, 1, 2], [3, 4]], [3, 2], 5)
    """
    paths_and_leaves = nests.flatten_with_paths(batch)
    leaves = [_to_tensor(leaf) for _, leaf in paths_and_leaves]
    if towers == 1:
        total = _rows_of_first(leaves)
        return Shards([nests.packed(batch, leaves)], [total], total)
    split = {
        index: _path_name(path)
        for index, (path, _) in enumerate(paths_and_leaves)
        if _has_rows(leaves[index]) and not (path and str(path[-1]) in whole)
    }
    total = _common_rows({name: leaves[index] for index, name in split.items()})
    starts, sizes, rows = _cuts(total, towers, fill=here is not None)
    mine = range(len(rows)) if here is None else here
    if not rows:
        return Shards([], [], 0)
    pieces = {index: _slices(leaves[index], starts, sizes, mine) for index in split}
    parts = [
        nests.packed(
            batch,
            [
                pieces[index][place] if index in pieces else leaf
                for index, leaf in enumerate(leaves)
            ],
        )
        for place in range(len(mine))
    ]
    return Shards(parts, rows, total)


def is_empty(batch: Any) -> bool:
    """Whether a batch is known to have no rows at all.

    Args:
        batch: Nest of tensors.

    Returns:
        `False` also where the number of rows is not known while tracing.
    """
    leaves = [leaf for leaf in map(_to_tensor, _leaves(batch)) if _has_rows(leaf)]
    return bool(leaves) and all(leaf.shape.rank and leaf.shape[0] == 0 for leaf in leaves)


def _leaves(batch: Any) -> list[Any]:
    return [leaf for _, leaf in nests.flatten_with_paths(batch)]


def _to_tensor(leaf: Any) -> Any:
    return tf.convert_to_tensor(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf


def _has_rows(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and leaf.shape.rank != 0


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(str(key) for key in path) or "the batch"


def _rows_of_first(leaves: list[Any]) -> Rows:
    """The number of rows where nothing is cut: what Keras takes for the batch size."""
    first = next((leaf for leaf in leaves if _has_rows(leaf)), None)
    if first is None:
        return 1
    known = first.shape[0] if first.shape.rank is not None else None
    return _dynamic_rows(first) if known is None else known


def _common_rows(leaves: dict[str, Any]) -> Rows:
    """The number of rows, the same for every leaf."""
    if not leaves:
        raise ValueError(
            "Expected a batch with at least one tensor that has rows (rank 1 or more), to share "
            "them out among the devices. Received none. Pass the data with a leading batch axis, "
            f"or do not cut it: {_UNCUT}."
        )
    static = {name: leaf.shape[0] for name, leaf in leaves.items() if leaf.shape.rank is not None}
    known = {name: rows for name, rows in static.items() if rows is not None}
    if len(set(known.values())) > 1:
        raise ValueError(
            "Expected every leaf of the batch to have the same number of rows. "
            f"Received: rows={known}. A leaf that every device needs whole must be declared: "
            'DataParallelModel(..., rules={"leaf name": "whole"}). Where no leaf can be cut, as in '
            f"graph networks, run the model on one device: {_UNCUT}."
        )
    unknown = [(name, leaf) for name, leaf in leaves.items() if name not in known]
    rows = next(iter(known.values())) if known else _dynamic_rows(unknown.pop(0)[1])
    # A leaf that turns out shorter at run time would be cut at the wrong places without an error.
    checks = [
        tf.debugging.assert_equal(
            _dynamic_rows(leaf),
            rows,
            message=f"Leaf {name} has another number of rows. If every device needs it whole, "
            'declare it: rules={"leaf name": "whole"}. Where no leaf can be cut, run the model on '
            f"one device: {_UNCUT}.",
        )
        for name, leaf in unknown
    ]
    if isinstance(rows, int):
        return rows
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(rows)


def _dynamic_rows(leaf: Any) -> tf.Tensor:
    if isinstance(leaf, tf.SparseTensor):
        return tf.cast(leaf.dense_shape[0], tf.int32)
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    return tf.shape(leaf)[0]


def _cuts(total: Rows, towers: int, *, fill: bool) -> tuple[list[Rows], list[Rows], list[Rows]]:
    """Where each part starts, how many rows it takes, how many of them count."""
    if isinstance(total, int):
        counts = row_counts(total, towers)
        if not counts or not fill:
            return [sum(counts[:tower]) for tower in range(len(counts))], counts, counts
        counts += [0] * (towers - len(counts))
        starts = [min(sum(counts[:tower]), total - 1) for tower in range(towers)]
        return starts, [max(count, 1) for count in counts], counts
    check = tf.debugging.assert_positive(total, message="The batch has no rows.")
    with tf.control_dependencies([] if check is None else [check]):
        base, extra = total // towers, total % towers
    rows = [base + tf.cast(tower < extra, tf.int32) for tower in range(towers)]
    starts = [
        tf.minimum(tower * base + tf.minimum(tower, extra), total - 1) for tower in range(towers)
    ]
    return starts, [tf.maximum(count, 1) for count in rows], rows


def _slices(leaf: Any, starts: list[Rows], sizes: list[Rows], mine: range) -> list[Any]:
    if isinstance(leaf, tf.SparseTensor):
        return [_slice_sparse(leaf, starts[tower], sizes[tower]) for tower in mine]
    known = isinstance(leaf, tf.Tensor) and all(isinstance(size, int) for size in sizes)
    if known and len(mine) == len(sizes):
        return tf.split(leaf, sizes)
    return [leaf[starts[tower] : starts[tower] + sizes[tower]] for tower in mine]


def _slice_sparse(leaf: tf.SparseTensor, start: Rows, size: Rows) -> tf.SparseTensor:
    inner = leaf.dense_shape[1:]
    begin = tf.concat([[tf.cast(start, tf.int64)], tf.zeros_like(inner)], axis=0)
    extent = tf.concat([[tf.cast(size, tf.int64)], inner], axis=0)
    part = tf.sparse.slice(leaf, begin, extent)
    # The slice op forgets the static shape, without which a Dense layer cannot read the tensor.
    part.set_shape([size if isinstance(size, int) else None, *leaf.shape[1:]])
    return part
