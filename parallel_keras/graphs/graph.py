"""Tricks with the graph that TensorFlow traces: what depends on what, and what it must not know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import nests
from parallel_keras.graphs.origin import ancestors


def is_handle(source: tf.Tensor) -> bool:
    """Whether a tower was given the handle of a variable instead of its value."""
    return source.dtype == tf.resource


@contextlib.contextmanager
def calling(layer: keras.layers.Layer, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, a layer calls this instead of its `call`.

    It is put into the instance, where Python finds it before the class and Keras
    does not take it for a layer or a weight.

    Args:
        layer: The layer, or model.
        call: Function with the arguments of its `call`.
    """
    attributes = vars(layer)
    before = attributes.get("call")
    attributes["call"] = call
    try:
        yield
    finally:
        if before is None:
            del attributes["call"]
        else:
            attributes["call"] = before


def depends_on(tensor: tf.Tensor, sources: Sequence[tf.Tensor]) -> bool:
    """Whether a tensor of a graph is computed from any of the sources, or at random.

    Args:
        tensor: Tensor of a `tf.function` that is being traced.
        sources: Sequence of tensors of the same graph.

    Returns:
        `False` only if it is certainly the same whatever the sources are.
    """
    ends = {source.op.name for source in sources}
    return any(
        op.name in ends or (op.op_def.is_stateful and op.type not in _READS)
        for op in ancestors(tensor)
    )


def varies(tensor: tf.Tensor, fixed: Sequence[tf.Tensor]) -> bool:
    """Whether a tensor of a loop, branch or function inside of a tower may depend on the shard.

    Args:
        tensor: Tensor of a graph that is being traced inside of the tower's.
        fixed: Tensors of the tower's graph that are the same on all towers.

    Returns:
        `False` only if it is certainly the same on all towers.
    """
    constant = {id(value) for value in fixed}
    waiting, seen = [tensor], {id(tensor)}
    while waiting:
        value = waiting.pop()
        if id(value) in constant or not hasattr(value, "op") or isinstance(value, tf.Variable):
            continue
        op, sources = value.op, list(value.op.inputs)
        if op.type == "Placeholder":
            captured = {id(inner): outer for outer, inner in getattr(op.graph, "captures", [])}
            # What a loop hands on from step to step is not followed.
            if id(value) not in captured:
                return True
            sources = [captured[id(value)]]
        elif op.op_def.is_stateful and op.type not in _READS:
            return True
        for source in sources:
            if id(source) not in seen:
                seen.add(id(source))
                waiting.append(source)
    return False


_READS = frozenset({"Placeholder", "ReadVariableOp", "VarHandleOp", "ResourceGather"})


def hide_sizes(part: Any) -> Any:
    """The same tensors, of which it is not known while tracing how many rows they have.

    Args:
        part: Nest of tensors.

    Returns:
        A nest like it.
    """

    def hide(leaf: Any) -> Any:
        if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
            return leaf
        return tf.compat.v1.placeholder_with_default(leaf, [None, *leaf.shape[1:]])

    return nests.mapped(hide, part)


def hide_value(number: tf.Tensor) -> tf.Tensor:
    """The same number, of which TensorFlow's optimiser does not know that it is a constant.

    A function that is called with a constant gets a copy of its own for that call: one for
    each tower, made one after the other before any tower starts.

    Args:
        number: Tensor of shape `()`.

    Returns:
        A tensor like it.
    """
    if tf.executing_eagerly():
        return number
    return tf.compat.v1.placeholder_with_default(number, number.shape)


@contextlib.contextmanager
def naming_tower(index: int, device: str) -> Iterator[None]:
    """Tells which tower an error comes from.

    Args:
        index: Int, the number of the tower.
        device: Its device.
    """
    try:
        yield
    except Exception as error:
        # Keras makes a new error from the class and the message, so that is where it must stand.
        if error.args and isinstance(error.args[0], str):
            where = f"This happened in tower {index} on device {device}."
            error.args = (f"{error.args[0]}\n\n{where}", *error.args[1:])
        raise
