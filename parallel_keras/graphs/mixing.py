"""Operations of a graph that may look at several rows at once.

What they say is only a reason to ask the model itself, which costs more: a maximum over rows may
well be taken off again, as in a softmax that is computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

# Operations with an argument that says over which axes they go, and where that is.
_OVER_AXES = {
    **dict.fromkeys(("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum"), 1),
    **dict.fromkeys(("ArgMax", "ArgMin", "Cumprod", "Cumsum", "CumulativeLogsumexp"), 1),
    "ReverseV2": 1,
    "Roll": 2,
    "ConcatV2": -1,
}
# Operations that go over rows whatever they are given.
_ALWAYS = frozenset(
    {
        "DenseBincount", "L2Loss", "RandomShuffle", "ScatterNd", "SegmentMax", "SegmentMean",
        "SegmentMin", "SegmentSumV2", "SegmentSum", "TensorListFromTensor", "TensorScatterUpdate",
        "Unique", "UniqueV2", "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentSum",
        "Where",
    }
)  # fmt: skip


def may_mix(
    operations: Mapping[str, Sequence[tf.Operation]], counts: Callable[[tf.Operation], bool]
) -> Iterator[tuple[tf.Operation, list[tf.Tensor]]]:
    """The operations of a graph that do not leave the first axis of something alone.

    Args:
        operations: Those of the graph, by type.
        counts: Which operations are looked at.

    Yields:
        Pairs of an operation and the tensors whose first axis it does not leave alone.
    """
    for kind in (_OVER_AXES.keys() | _ALWAYS | _SPECIAL.keys()) & operations.keys():
        for op in filter(counts, operations[kind]):
            mixed = _mixed(op)
            if mixed:
                yield op, mixed


def _mixed(op: tf.Operation) -> list[tf.Tensor]:
    """Those of the inputs whose first axis an operation does not leave alone."""
    if op.type in _ALWAYS:
        return list(op.inputs[:1])
    if op.type in _OVER_AXES:
        axes = tf.get_static_value(op.inputs[_OVER_AXES[op.type]])
        rank = op.inputs[0].shape.rank
        over = axes is not None and rank and {int(axis) % rank for axis in _flat(axes)}
        values = op.inputs[:-1] if op.type == "ConcatV2" else op.inputs[:1]
        return list(values) if over and 0 in over else []
    return _SPECIAL[op.type](op)


def _flat(axes: Any) -> list[Any]:
    return list(axes.reshape(-1)) if hasattr(axes, "reshape") else [axes]


def _transposed(op: tf.Operation) -> list[tf.Tensor]:
    order = tf.get_static_value(op.inputs[1])
    # An order that is computed, as TensorFlow does for a softmax over another axis.
    moved = order is None or (len(order) and order[0] != 0)
    return [op.inputs[0]] if moved else []


def _tiled(op: tf.Operation) -> list[tf.Tensor]:
    times = tf.get_static_value(op.inputs[1])
    return [op.inputs[0]] if times is not None and len(times) and times[0] != 1 else []


def _multiplied(op: tf.Operation) -> list[tf.Tensor]:
    return [op.inputs[0]] if op.get_attr("transpose_a") else [op.inputs[1]]


def _gathered(op: tf.Operation) -> list[tf.Tensor]:
    axis = tf.get_static_value(op.inputs[2])
    return [op.inputs[0]] if axis == 0 and op.get_attr("batch_dims") == 0 else []


def _summed(op: tf.Operation) -> list[tf.Tensor]:
    takes, gives = op.get_attr("equation").decode().split("->")
    pairs = zip(takes.split(","), op.inputs, strict=True)
    return [tensor for axes, tensor in pairs if axes and axes[0] != gives[:1]]


def _sliced(op: tf.Operation) -> list[tf.Tensor]:
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask")
    begin, end, ellipsis, new = (op.get_attr(name) & 1 for name in masks)
    strides = tf.get_static_value(op.inputs[3])
    whole = begin and end and strides is not None and strides[0] == 1
    is_size = op.inputs[0].op.type == "Shape"
    return [] if whole or ellipsis or new or is_size else [op.inputs[0]]


_SPECIAL = {
    "Einsum": _summed,
    "GatherV2": _gathered,
    "MatMul": _multiplied,
    "StridedSlice": _sliced,
    "Tile": _tiled,
    "Transpose": _transposed,
}
