"""A tower that was just traced: its graph, and what it was traced with."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras.graphs.function_bodies import Bodies
from parallel_keras.towers.needs import Needs

if TYPE_CHECKING:
    from parallel_keras.towers.tower import Tower


@dataclasses.dataclass
class Trace:
    """A tower that was just traced.

    Attributes:
        graph: Its graph.
        tower: The tower.
        needs: What it was traced with.
        given: What stood for each variable.
        inner: The graphs of loops, branches and functions in which weights were read.
        talks: Whether towers wait for each other in the middle.
        alone: Whether there is one tower only.
        jit: Whether XLA compiles it.
    """

    graph: Any
    tower: Tower
    needs: Needs
    given: list[Any]
    inner: list[Any]
    talks: bool
    alone: bool
    jit: bool

    def __post_init__(self) -> None:
        """Reads the graph, once."""
        self.bodies = Bodies(self.graph)
        self.by_type: dict[str, list[tf.Operation]] = defaultdict(list)
        for op in self.graph.get_operations():
            self.by_type[op.type].append(op)

    def nodes(self, kinds: frozenset[str]) -> Iterator[Any]:
        """The `NodeDef`s of operations of some types, inside of functions, too."""
        for kind in kinds & self.by_type.keys():
            yield from (op.node_def for op in self.by_type[kind])
        # Only what is stateful can hold something that is.
        for kind in {"Case", "If", "StatefulPartitionedCall", "While"} & self.by_type.keys():
            for op in self.by_type[kind]:
                yield from (node for node in self.bodies.nodes(op) if node.op in kinds)

    def captured(self) -> Iterator[tuple[tf.Tensor, list[str]]]:
        """The handles that the tower was not given, and the types of operations that use them."""
        stand_ins = [value for value in self.given if isinstance(value, tf.Variable)]
        known = self.variables()
        given = {id(value.handle) for value in stand_ins} - known.keys()
        for outer, inner in self.graph.captures:
            if inner.dtype == tf.resource and id(outer) not in given:
                yield outer, list(self.bodies.users(inner))

    def parts(self) -> list[tf.Tensor]:
        """What the tower was given besides weights."""
        others = {id(inner) for _, inner in self.graph.captures} | set(map(id, self.given))
        given = [op.outputs[0] for op in self.by_type["Placeholder"]]
        return [tensor for tensor in given if id(tensor) not in others]

    def variables(self) -> dict[int, keras.Variable]:
        """The variables that the tower knows, by the id of their handle."""
        known = self.tower.variables
        values = [(variable, variable.value) for variable in known]
        return {id(v.handle): variable for variable, v in values if isinstance(v, tf.Variable)}
