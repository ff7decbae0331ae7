"""From the results of the towers of one worker to those of all workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from parallel_keras import merge
from parallel_keras.shard import Shards
from parallel_keras.workers.feeding import check_marks

# What a tower returns that has a row for each of its own.
_OF_ROWS = ("outputs", "masks", "logits")

Columns = list[list[Any]]


class MarkedShards(Shards):
    """The `Shards` of a batch that all workers must have.

    Attributes:
        mark: What tells the batch from others, see `feeding.mark`.
    """

    mark: tf.Tensor

    @classmethod
    def of(cls, shards: Shards, mark: tf.Tensor) -> MarkedShards:
        """The same shards, marked."""
        marked = cls(*shards)
        marked.mark = mark
        return marked


def join(workers: Any, results: list[dict[str, Any]], kind: str, shards: Shards) -> Any:
    """From the results of the towers of this worker to those of all, in one message.

    Args:
        workers: The `Workers`.
        results: For each tower here a dict. What the towers' `"gradients"` are is
            added up: the first tower of the result has the sum.
        kind: One of `KINDS`.
        shards: What the towers were given.

    Returns:
        For each tower of all workers a dict; those of this worker are untouched but
        for gradients.
    """
    columns = [
        list(column) for column in zip(*[r.get("gradients", ()) for r in results], strict=True)
    ]
    dense, sparse = _kinds_of_gradients(columns)
    same = [{k: r[k] for k in r if k not in ("gradients", *_OF_ROWS)} for r in results]
    free = [
        {
            "outputs": [result.get(kind) for kind in _OF_ROWS],
            "sparse": [columns[index][tower] for index in sparse],
        }
        for tower, result in enumerate(results)
    ]
    if isinstance(shards, MarkedShards):
        same = [{**result, "mark": shards.mark} for result in same]
    elif workers.own and shards.rows:
        some = tf.add_n(shards.rows[workers.first : workers.first + workers.here]) > 0
        dense = {index: _only(value, some) for index, value in dense.items()}
        same = [_only_losses(result, some) for result in same]
    sums, fixed, varied = workers.exchange(
        kind, list(dense.values()), [tensors(s) for s in same], [tensors(f) for f in free]
    )
    joined = []
    for tower, (one, other) in enumerate(zip(fixed, varied, strict=True)):
        local = tower - workers.first
        here = 0 <= local < workers.here
        result = with_tensors(same[local if here else 0], one)
        if here and kind == "call":
            # Gradients will flow to the terms of the loss, so they must stay what they were.
            result["losses"] = same[local]["losses"]
        outputs = free[local] if here else with_tensors(free[0], other)
        gradients = [None] * len(columns)
        for position, index in enumerate(sparse):
            gradients[index] = outputs["sparse"][position]
        result.update(zip(_OF_ROWS, outputs["outputs"], strict=True))
        joined.append({**result, "gradients": gradients})
    for index, value in zip(dense, sums, strict=True):
        joined[0]["gradients"][index] = value
    check_marks([result.pop("mark", None) for result in joined], workers)
    return joined


def _kinds_of_gradients(columns: Columns) -> tuple[dict[int, tf.Tensor], list[int]]:
    """The sums of dense gradients by the number of the weight; the numbers of sparse ones."""
    present = {
        index: column
        for index, column in enumerate(columns)
        if any(value is not None for value in column)
    }
    sparse = [
        index
        for index, column in present.items()
        if all(isinstance(value, tf.IndexedSlices) for value in column)
    ]
    dense = {
        index: tf.convert_to_tensor(merge.total(column))
        for index, column in present.items()
        if index not in sparse
    }
    return dense, sparse


def tensors(nest: Any) -> list[tf.Tensor]:
    """The tensors of a nest, also those inside of ragged and sparse ones."""
    return [leaf for leaf in tf.nest.flatten(nest, expand_composites=True) if _travels(leaf)]


def _travels(leaf: Any) -> bool:
    return tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)


def with_tensors(nest: Any, tensors: Sequence[tf.Tensor]) -> Any:
    """The nest with other tensors, in the order of `_tensors`."""
    others = iter(tensors)
    flat = [
        next(others) if _travels(leaf) else leaf
        for leaf in tf.nest.flatten(nest, expand_composites=True)
    ]
    return tf.nest.pack_sequence_as(
        tf.nest.map_structure(_of_any_rows, nest), flat, expand_composites=True
    )


def _of_any_rows(leaf: Any) -> Any:
    """What a ragged or sparse tensor is made by, without the number of its rows."""
    if isinstance(leaf, tf.RaggedTensor):
        shape = [None, *leaf.shape[1:]]
        return tf.RaggedTensorSpec(shape, leaf.dtype, leaf.ragged_rank, leaf.row_splits.dtype)
    if isinstance(leaf, tf.SparseTensor):
        return tf.SparseTensorSpec([None, *leaf.shape[1:]], leaf.dtype)
    return leaf


def _only(value: Any, some: tf.Tensor) -> Any:
    """Zeros instead of the floats of a worker that has no rows: theirs may be NaN."""
    return tf.where(some, value, tf.zeros_like(value)) if value.dtype.is_floating else value


def _only_losses(result: dict[str, Any], some: tf.Tensor) -> dict[str, Any]:
    losses = {key: result[key] for key in ("loss", "losses") if key in result}
    return {**result, **tf.nest.map_structure(lambda value: _only(value, some), losses)}
