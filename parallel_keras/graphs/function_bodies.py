"""What is inside of the functions, loops and branches that a graph calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

# How many inputs come before those of the function.
_BEFORE = {"Case": 1, "If": 1, "StatelessCase": 1, "StatelessIf": 1}
_CALLS = frozenset(
    {
        "PartitionedCall", "StatefulPartitionedCall", "StatelessWhile", "SymbolicGradient", "While",
        *_BEFORE,
    }
)  # fmt: skip


class Bodies:
    """The bodies of the functions of a graph, read when they are first asked for.

    Args:
        graph: The graph of a `tf.function` that is being traced.
    """

    def __init__(self, graph: tf.Graph) -> None:
        self._graph = graph

    @functools.cached_property
    def _functions(self) -> dict[str, Any]:
        library = self._graph.as_graph_def().library
        return {function.signature.name: function for function in library.function}

    def nodes(self, op: tf.Operation) -> Iterator[Any]:
        """The nodes inside of what an operation calls, also deeper ones.

        Args:
            op: Operation of the graph.

        Yields:
            `NodeDef`s.
        """
        waiting, seen = list(_called(op.node_def)), set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._functions:
                continue
            seen.add(name)
            for node in self._functions[name].node_def:
                yield node
                waiting += _called(node)

    def users(self, tensor: tf.Tensor) -> Iterator[str]:
        """The types of the operations that take a tensor in the end, inside of functions, too.

        Args:
            tensor: Tensor of the graph.

        Yields:
            Names of operation types.
        """
        for op in tensor.consumers():
            if op.type not in _CALLS:
                yield op.type
                continue
            places = [i for i, value in enumerate(op.inputs) if value is tensor]
            yield from self._users_inside(op.node_def, op.type, places, frozenset())

    def _users_inside(
        self, call: Any, kind: str, places: Sequence[int], above: frozenset[str]
    ) -> Iterator[str]:
        for name in _called(call):
            if name in above or name not in self._functions:
                continue
            function = self._functions[name]
            arguments = function.signature.input_arg
            for place in (place - _BEFORE.get(kind, 0) for place in places):
                if not 0 <= place < len(arguments):
                    continue
                for node in function.node_def:
                    taken = [
                        i for i, name in enumerate(node.input) if name == arguments[place].name
                    ]
                    if taken and node.op in _CALLS:
                        yield from self._users_inside(node, node.op, taken, above | {name})
                    elif taken:
                        yield node.op


def _called(node: Any) -> list[str]:
    names = []
    for attribute in node.attr.values():
        names += [attribute.func.name] if attribute.func.name else []
        names += [function.name for function in attribute.list.func]
    return names
