"""What goes from device to device in a step: messages and bytes, counted in its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from parallel_keras.homes.links import canonical

Way = tuple[str, str]
# They have no device because their bodies run where each operation in them does.
_OPEN = frozenset({"If", "StatelessIf", "While", "StatelessWhile"})
# TensorFlow makes these anew wherever they are read, or gives them the place of what they read.
_ANYWHERE = frozenset({"Const", "NoOp"})
_FOLLOWING = frozenset({"Identity", "ReadVariableOp", "Cast", "PlaceholderWithDefault"})


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What goes from device to device in one run of a graph.

    Attributes:
        messages: How many tensors, by the device they come from and the one they go to.
        bytes: Of those tensors whose size is known while tracing, likewise.
    """

    messages: Mapping[Way, int]
    bytes: Mapping[Way, int]

    @property
    def devices(self) -> list[str]:
        """All devices that take part."""
        return sorted({device for way in self.messages for device in way})

    def messages_into(self, device: str) -> int:
        """How many tensors a device gets from others."""
        return sum(count for (_, target), count in self.messages.items() if target == device)

    def bytes_into(self, device: str) -> int:
        """How many bytes a device gets from others."""
        return sum(size for (_, target), size in self.bytes.items() if target == device)

    def bytes_out_of(self, device: str) -> int:
        """How many bytes others get from a device."""
        return sum(size for (source, _), size in self.bytes.items() if source == device)

    @property
    def busiest(self) -> tuple[str, int]:
        """The device with the most bytes in one direction, and how many; a link carries both."""
        loads = {
            device: max(self.bytes_into(device), self.bytes_out_of(device))
            for device in self.devices
        }
        device = max(loads, key=lambda name: loads[name], default="")
        return device, loads.get(device, 0)


def traffic(graph: Any, handles: Mapping[int, str] | None = None, default: str = "") -> Traffic:
    """Counts what goes from device to device in a run of the graph of a step.

    A tensor counts once for each device that it goes to, as TensorFlow sends it. Bodies of
    conditions are not looked into.

    Args:
        graph: The graph of a concrete function.
        handles: From the `id` of a variable's handle to its device; of others TensorFlow is
            asked. Defaults to `Homes.handles` of none.
        default: Where operations without a device run: the first GPU, if there is one.
            Defaults to the first CPU.

    Returns:
        The `Traffic`.

    Example:
    >>> import tensorflow as tf
    >>> from parallel_keras.explaining.traffic import traffic
    >>> def step(x):
    ...     with tf.device("/CPU:1"):
    ...         return tf.identity(x)
    >>> graph = tf.function(step).get_concrete_function(tf.TensorSpec([3])).graph
    >>> traffic(graph).bytes
    {('/device:CPU:0', '/device:CPU:1'): 12}
    """
    messages: dict[Way, int] = {}
    sizes: dict[Way, int] = {}
    sent = crossings(graph, handles, default)
    for source, target, tensor in sorted(sent, key=lambda crossing: crossing[:2]):
        messages[source, target] = messages.get((source, target), 0) + 1
        sizes[source, target] = sizes.get((source, target), 0) + _bytes(tensor)
    return Traffic(messages, sizes)


def crossings(
    graph: Any, handles: Mapping[int, str] | None = None, default: str = ""
) -> list[tuple[str, str, tf.Tensor]]:
    """The tensors that go from device to device.

    Args:
        graph: As in `traffic`.
        handles: As in `traffic`.
        default: As in `traffic`.

    Returns:
        A list of the device a tensor comes from, the one it goes to, and the tensor.
    """
    places = _Places(graph, handles or {}, default or canonical("/CPU:0"))
    sent = {}
    for operation in graph.get_operations():
        if operation.type in _OPEN or operation.type in _ANYWHERE:
            continue
        target = places.of(operation)
        for tensor in operation.inputs:
            if tensor.dtype in (tf.resource, tf.variant):
                continue  # the name of a thing, not the thing
            source = places.of(tensor.op)
            if source and target and source != target:
                sent[target, tensor.ref()] = source, target, tensor
    return list(sent.values())


class _Places:
    """Where TensorFlow runs the operations of a graph.

    Args:
        graph: The graph.
        handles: From the `id` of a variable's handle to its device.
        default: Where it runs what nothing ties to a device.
    """

    def __init__(self, graph: Any, handles: Mapping[int, str], default: str) -> None:
        self._default = default
        self._known: dict[str, str] = {}
        for outside, inside in graph.captures:
            place = handles.get(id(outside)) or canonical(getattr(outside, "device", "") or "")
            self._known[inside.op.name] = place or default

    def of(self, operation: tf.Operation) -> str:
        """The device of an operation, `""` if it is made wherever it is needed."""
        if operation.name not in self._known:
            self._known[operation.name] = self._find(operation)
        return self._known[operation.name]

    def _find(self, operation: tf.Operation) -> str:
        if operation.device:
            return str(operation.device)
        if operation.type in _ANYWHERE or operation.type in _OPEN:
            return ""
        handles = [tensor for tensor in operation.inputs if tensor.dtype == tf.resource]
        if handles and "PartitionedCall" not in operation.type:
            return self.of(handles[0].op)
        if operation.type in _FOLLOWING:
            return self.of(operation.inputs[0].op)
        # What is made of constants is one.
        made = operation.inputs and not any(self.of(tensor.op) for tensor in operation.inputs)
        return "" if made else self._default


def _bytes(tensor: tf.Tensor) -> int:
    if not tensor.shape.is_fully_defined():
        return 0
    return int(tensor.shape.num_elements() * tensor.dtype.size)
