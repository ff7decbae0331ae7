"""Where a tensor comes from, also through the functions that a graph calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from parallel_keras import _compat

_PURE_READS = frozenset({"Placeholder", "ReadVariableOp", "VarHandleOp", "ResourceGather"})


class Spot(NamedTuple):
    """A tensor of a graph, or of a function that it calls.

    Attributes:
        tensor: The tensor.
        calls: The operations by which one came into the function, the last one innermost.
    """

    tensor: tf.Tensor
    calls: tuple[tf.Operation, ...] = ()

    @property
    def op(self) -> tf.Operation:
        """The operation that computes it."""
        return self.tensor.op

    @property
    def number(self) -> int:
        """Which of the operation's outputs it is."""
        return int(self.tensor.value_index)

    @property
    def key(self) -> Any:
        """What tells it from other spots."""
        return (id(self.op.graph), self.op.name, self.number, *(call.name for call in self.calls))


def inside(spot: Spot) -> list[Spot]:
    """What a tensor is computed from, as far as one can look.

    Args:
        spot: The tensor.

    Returns:
        The inputs of its operation; what a function returned for it, and what was given to
        the function for its argument.
    """
    op, calls = spot.op, spot.calls
    body = _compat.function_body(op)
    if body is not None:
        return [Spot(body.outputs[spot.number], (*calls, op))]
    if op.type == "Placeholder" and calls:
        names = [argument.op.name for argument in _compat.function_body(calls[-1]).inputs]
        if op.name in names:
            return [Spot(calls[-1].inputs[names.index(op.name)], calls[:-1])]
    if op.type == "Placeholder" and not calls:
        outside = _compat.captured(spot.tensor)
        return [] if outside is None else [Spot(outside)]
    return [Spot(tensor, calls) for tensor in op.inputs]


def source_of(spot: Spot) -> Spot:
    """Goes back to what computed a vector, past what only copies it, and out of functions.

    Args:
        spot: Where to start.

    Returns:
        A spot with the same values in the same order, but for other names of the same rows.
    """
    while True:
        op = spot.op
        reshaped = op.type == "Reshape" and op.inputs[0].shape.rank == 1
        if reshaped or op.type in ("Identity", "Cast", "StopGradient"):
            spot = Spot(op.inputs[0], spot.calls)
        elif _counts_from_the_end(op):
            spot = Spot(op.inputs[2], spot.calls)
        elif _compat.function_body(op) is not None or (op.type == "Placeholder" and spot.calls):
            (before,) = inside(spot) or (spot,)
            if before is spot:
                return spot
            spot = before
        else:
            return spot


def _counts_from_the_end(op: tf.Operation) -> bool:
    """Whether it is `where(index < 0, index + size, index)`, as in Keras' `take`."""
    if op.type != "SelectV2":
        return False
    test, moved, index = op.inputs
    return bool(
        test.op.type == "Less"
        and moved.op.type == "AddV2"
        and all(other.op.inputs[0].op.name == index.op.name for other in (test, moved))
    )


def depends_on_rows(spot: Spot, sources: Sequence[tf.Tensor]) -> bool:
    """Whether a tensor is computed from rows of the sources, or how many there are, or at random.

    How long rows are does not count: it is the same for all of them.

    Args:
        spot: The tensor.
        sources: Sequence of tensors with rows, on their first axis.

    Returns:
        `False` only if it is the same whatever the rows are.
    """
    ends = {(id(source.graph), source.op.name) for source in sources}
    waiting, seen = [spot], {spot.key}
    while waiting:
        here = waiting.pop()
        op = here.op
        called = _compat.function_body(op) is not None
        if (id(op.graph), op.name) in ends:
            return True
        if not called and op.op_def.is_stateful and op.type not in _PURE_READS:
            return True
        if _is_length(here):
            continue
        befores = inside(here)
        if op.type == "Placeholder" and not befores and here.tensor.dtype != tf.resource:
            return True  # handed in from where one cannot look, such as a trace that is over
        for before in befores:
            if before.key not in seen:
                seen.add(before.key)
                waiting.append(before)
    return False


def _is_length(spot: Spot) -> bool:
    """Whether it is the size of another axis than the first of something."""
    op = spot.op
    if op.type == "Unpack":
        return op.inputs[0].op.type == "Shape" and spot.number > 0
    if op.type != "StridedSlice" or op.inputs[0].op.type != "Shape":
        return False
    axes = op.inputs[0].shape[0]
    begin = tf.get_static_value(op.inputs[1])
    one = op.get_attr("shrink_axis_mask") == 1 and not op.get_attr("begin_mask")
    return axes is not None and begin is not None and one and int(begin[0]) % int(axes) > 0


def body_and_inputs(
    tensors: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]
) -> tuple[Any, list[tf.Tensor], list[tuple[tf.Tensor, str]]]:
    """The graph that computes tensors from sources, alone, if a function does it.

    Args:
        tensors: Sequence of tensors of one graph, all from one call of a function, or all not.
        sources: Sequence of tensors of that graph.

    Returns:
        A graph, what the tensors are in there, and what the sources are, with their names.
    """
    graph, outs = tensors[0].graph, list(tensors)
    ins = [(source, source.name) for source in sources]
    spots = [_inside_of_call(tensor) for tensor in tensors]
    calls = {id(spot.calls[0]): spot.calls[0] for spot in spots if spot.calls}
    if len(calls) == 1 and all(spot.calls for spot in spots):
        (call,) = calls.values()
        body = _compat.function_body(call)
        named = {source.name for source in sources}
        pairs = zip(call.inputs, body.inputs, strict=True)
        known = [(inner, _not_hidden(outer).name) for outer, inner in pairs]
        ins = [(inner, name) for inner, name in known if name in named]
        graph, outs = body, [spot.tensor for spot in spots]
    return graph, outs, ins


def _inside_of_call(tensor: tf.Tensor) -> Spot:
    spot = Spot(tensor)
    while spot.op.type == "Identity":
        spot = Spot(spot.op.inputs[0])
    return inside(spot)[0] if _compat.function_body(spot.op) is not None else Spot(tensor)


def _not_hidden(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor of which a tower was not told the size, see `graph.hide_sizes`."""
    hidden = tensor.op.type in ("PlaceholderWithDefault", "Identity")
    return _not_hidden(tensor.op.inputs[0]) if hidden else tensor


def ancestors(tensor: tf.Tensor) -> Iterator[tf.Operation]:
    """The operations that a tensor is computed by, from its own one backwards.

    Args:
        tensor: Tensor of a graph.

    Yields:
        Each operation once.
    """
    waiting, seen = [tensor.op], {tensor.op.name}
    while waiting:
        op = waiting.pop()
        yield op
        for parent in (value.op for value in op.inputs):
            if parent.name not in seen:
                seen.add(parent.name)
                waiting.append(parent)
