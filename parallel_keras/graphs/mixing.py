"""Operations of a graph that may look at several rows at once.

What they say is only a reason to ask the model itself, which costs more: a maximum over rows may
well be taken off again, as in a softmax that is computed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from parallel_keras.graphs.origin import ancestors

# Operations with an argument that says over which axes they go, and where that is.
_OVER_AXES = {
    **dict.fromkeys(("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum"), 1),
    **dict.fromkeys(("ArgMax", "ArgMin", "Cumprod", "Cumsum", "CumulativeLogsumexp"), 1),
    "ReverseV2": 1,
    "Roll": 2,
    "ConcatV2": -1,
}
# Operations that go over rows whatever they are given, or that may do anything inside.
_ALWAYS = frozenset(
    {
        "Bincount", "Case", "DenseBincount", "DynamicPartition", "FusedBatchNorm",
        "FusedBatchNormV2", "FusedBatchNormV3", "If", "L2Loss", "PartitionedCall",
        "RandomShuffle", "ScatterNd", "SegmentMax", "SegmentMaxV2", "SegmentMean", "SegmentMin",
        "SegmentMinV2", "SegmentProd", "SegmentProdV2", "SegmentSum", "SegmentSumV2",
        "StatefulPartitionedCall", "StatelessCase", "StatelessIf", "StatelessWhile",
        "TensorListFromTensor", "TensorScatterAdd", "TensorScatterMax", "TensorScatterMin",
        "TensorScatterSub", "TensorScatterUpdate", "Unique", "UniqueV2", "UniqueWithCounts",
        "UniqueWithCountsV2", "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentProd",
        "UnsortedSegmentSum", "Where", "While",
    }
)  # fmt: skip
# Operations that join tensors of other shapes, place by place.
_PLACE_BY_PLACE = (
    "Add", "AddV2", "BatchMatMulV2", "DivNoNan", "Equal", "Greater", "GreaterEqual", "Less",
    "LessEqual", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Mul", "MulNoNan", "NotEqual",
    "Pow", "RealDiv", "SelectV2", "SquaredDifference", "Sub",
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
        return list(op.inputs)
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
    if op.type == "GatherNd":
        return [op.inputs[0]]
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
    return [] if ((whole or ellipsis) and not new) or _is_size(op.inputs[0]) else [op.inputs[0]]


def _is_size(tensor: tf.Tensor) -> bool:
    return tensor.op.type == "Shape"


def _broadcast(op: tf.Operation) -> list[tf.Tensor]:
    """What has fewer axes than the result: its rows are put beside other rows."""
    ranks = [tensor.shape.rank for tensor in op.inputs]
    if None in ranks:
        return []
    return [x for x, rank in zip(op.inputs, ranks, strict=True) if 0 < rank < max(ranks)]


def _expanded(op: tf.Operation) -> list[tf.Tensor]:
    axis, rank = tf.get_static_value(op.inputs[1]), op.inputs[0].shape.rank
    return [op.inputs[0]] if rank and axis is not None and int(axis) in (0, -rank - 1) else []


def _packed(op: tf.Operation) -> list[tf.Tensor]:
    rank = op.inputs[0].shape.rank
    return list(op.inputs) if rank and op.get_attr("axis") in (0, -rank - 1) else []


def _unpacked(op: tf.Operation) -> list[tf.Tensor]:
    tensor = op.inputs[0]
    first = op.get_attr("axis") in (0, -(tensor.shape.rank or 0))
    return [tensor] if first and not _is_size(tensor) else []


def _split(op: tf.Operation) -> list[tf.Tensor]:
    tensor, axis = (op.inputs[0], op.inputs[2]) if op.type == "SplitV" else reversed(op.inputs)
    first = tf.get_static_value(axis) in (0, -(tensor.shape.rank or 0))
    return [tensor] if first and not _is_size(tensor) else []


def _over_last(op: tf.Operation) -> list[tf.Tensor]:
    return [op.inputs[0]] if op.inputs[0].shape.rank == 1 else []


def _as_matrix(op: tf.Operation) -> list[tf.Tensor]:
    return [op.inputs[0]] if op.inputs[0].shape.rank == 2 else []


def _reshaped(op: tf.Operation) -> list[tf.Tensor]:
    """What is laid out so that what was in one row is not, from the first time on."""
    tensor, result = op.inputs[0], op.outputs[0]
    if not tensor.shape.rank or not result.shape.rank:
        return []
    size, *inner = tensor.shape
    new_size, *new_inner = result.shape
    if size is None and new_size is not None:
        return [tensor]
    if None in inner:
        return []
    kept = (
        None not in new_inner
        and math.prod(new_inner)
        and not math.prod(inner) % math.prod(new_inner)
    )
    return [] if kept or _was_reshaped(tensor) else [tensor]


def _was_reshaped(tensor: tf.Tensor) -> bool:
    """Whether a tensor comes of one whose rows were taken apart: that may be taken back."""
    return any(op.type == "Reshape" and _takes_rows_apart(op) for op in ancestors(tensor))


def _takes_rows_apart(op: tf.Operation) -> bool:
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if not before.rank or not after.rank:
        return False
    inner, new_inner = before.as_list()[1:], after.as_list()[1:]
    return None in inner or (None not in new_inner and math.prod(new_inner) < math.prod(inner))


def _as_number(op: tf.Operation) -> list[tf.Tensor]:
    """What the number of rows is taken of, where it becomes a number to compute with."""
    size = op.inputs[1] if op.type == "Range" else op.inputs[0]
    if op.type == "Cast" and not (size.dtype.is_integer and op.outputs[0].dtype.is_floating):
        return []
    source = size.op
    if source.type == "StridedSlice":
        begin = tf.get_static_value(source.inputs[1])
        if begin is None or begin[0] != 0 or not _is_size(source.inputs[0]):
            return []
        source = source.inputs[0].op
    elif source.type == "Unpack" and size is source.outputs[0]:
        source = source.inputs[0].op
    return [source.inputs[0]] if source.type in ("Shape", "Size") else []


_SPECIAL = {
    **dict.fromkeys(_PLACE_BY_PLACE, _broadcast),
    **dict.fromkeys(("LogSoftmax", "Softmax", "TopKV2"), _over_last),
    **dict.fromkeys(("Qr", "SelfAdjointEigV2", "Svd"), _as_matrix),
    "Cast": _as_number,
    "Einsum": _summed,
    "ExpandDims": _expanded,
    "GatherNd": _gathered,
    "GatherV2": _gathered,
    "MatMul": _multiplied,
    "Pack": _packed,
    "Range": _as_number,
    "Reshape": _reshaped,
    "Split": _split,
    "SplitV": _split,
    "StridedSlice": _sliced,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Unpack": _unpacked,
}
