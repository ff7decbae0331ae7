"""What the graph of a tower tells after it was traced: one look, one table of what to do.

A tower is meant to be a pure function. Code of a model can do what makes it none, or what makes
copies of one trace disturb each other. The operations of its graph show that:

| found in the graph                                      | what it leads to                     |
|---------------------------------------------------------|--------------------------------------|
| random operations that took a seed when they were traced | a trace for each tower              |
| Python functions that a gradient may go through         | a trace for each tower               |
| a custom gradient that uses a weight it does not take   | such weights are read as variables   |
| the handle of a weight that the tower was not given     | that weight is read as a variable    |
| an assignment to what is no variable of Keras           | refused                              |
| a change to a table                                     | refused                              |
| a resource that calls wait for, in towers that talk     | refused                              |
| what goes over the first axis, in layers of the user's  | the model is asked, and the log told |
| numbers for each row, drawn from a constant seed        | the log is told                      |

Most models do nothing of this, and the look is all that they pay.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras.graphs.function_bodies import Bodies
from parallel_keras.graphs.graph import depends_on
from parallel_keras.graphs.mixing import may_mix
from parallel_keras.towers.naming import Names, Outside, name_of
from parallel_keras.towers.needs import Needs, TraceAgain
from parallel_keras.towers.recompute import values_are_known
from parallel_keras.towers.saying import warn_once
from parallel_keras.towers.seeds import is_seed

if TYPE_CHECKING:
    from parallel_keras.towers.tower import Tower

_RANDOM = frozenset(
    {
        "Multinomial",
        "ParameterizedTruncatedNormal",
        "RandomGamma",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "TruncatedNormal",
    }
)
# What reads a resource: all calls of one function may do so at the same time.
_READS = frozenset(
    {
        "Identity", "LookupTableExportV2", "LookupTableFindV2", "LookupTableSizeV2",
        "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarIsInitializedOp",
        "VariableShape",
    }
)  # fmt: skip
_CHANGES_TABLE = ("LookupTableImportV2", "LookupTableInsertV2", "LookupTableRemoveV2")
_ASSIGNS = ("Assign", "Resource", "Rng", "Stateful")


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


def look_at(trace: Trace) -> None:
    """Looks at what a tower did.

    Args:
        trace: The tower that was just traced.

    Raises:
        TraceAgain: If it needs something that it was traced without.
        ValueError: If it does what cannot be made right, naming the layer.
    """
    for look in _TABLE:
        look(trace)


def _streams(trace: Trace) -> None:
    if trace.alone or trace.needs.apart:
        return
    drawn = trace.nodes(_RANDOM)
    if any(node.attr["seed"].i or node.attr["seed2"].i for node in drawn):
        raise TraceAgain(apart=True)
    # TensorFlow keeps the way back of such a function under a key that all copies share.
    if any(trace.nodes(frozenset({"EagerPyFunc"}))):
        raise TraceAgain(apart=True)


def look_for_hidden(trace: Trace) -> None:
    """Looks for weights that a custom gradient uses: TensorFlow looks for variables.

    Args:
        trace: The tower that was just traced, also if that failed.

    Raises:
        TraceAgain: If there are any that were no variables.
    """
    found: set[int] = set()
    for graph in {id(graph): graph for graph in (trace.graph, *trace.inner)}.values():
        here = graph is trace.graph
        operations = trace.by_type["IdentityN"] if here else graph.get_operations()
        custom = [op for op in operations if op.type == "IdentityN" and _is_custom_gradient(op)]
        weights = _weights_in(graph, trace) if custom else {}
        for op in custom:
            found |= _used_but_not_taken(op, weights)
    # A layer that is computed again draws again, and each tower from its own stream.
    apart = not trace.alone and any(map(is_seed, trace.tower.variables))
    variables = [trace.tower.variables[index] for index in sorted(found)]
    _read_as_variables(trace, variables, apart=apart)


def _is_custom_gradient(op: tf.Operation) -> bool:
    try:
        return bool(op.get_attr("_gradient_op_type").startswith(b"CustomGradient"))
    except ValueError:
        return False


def _weights_in(graph: Any, trace: Trace) -> dict[int, int]:
    """The number of a weight by the id of the tensor that it is in a graph."""
    if graph is trace.graph:
        tensors = enumerate(trace.given)
        return {id(value): index for index, value in tensors if isinstance(value, tf.Tensor)}
    outside = _weights_in(graph.outer_graph, trace) if graph.outer_graph is not None else {}
    return {id(inner): outside[id(x)] for x, inner in graph.captures if id(x) in outside}


def _used_but_not_taken(op: tf.Operation, weights: dict[int, int]) -> set[int]:
    """The numbers of the weights behind what a custom gradient returns, up to what it takes.

    The operation's inputs are first what it returns and then what it takes.
    """
    ends = {id(value) for value in op.inputs}
    found, taken, seen = set(), set(), set()
    for result in op.inputs:
        if id(result) in taken:
            continue
        waiting = [result]
        while waiting:
            for value in waiting.pop().op.inputs:
                if id(value) in ends:
                    taken.add(id(value))
                elif id(value) in weights:
                    found.add(weights[id(value)])
                elif id(value) not in seen:
                    seen.add(id(value))
                    waiting.append(value)
    return found


def _read_as_variables(
    trace: Trace, variables: list[keras.Variable], *, apart: bool = False
) -> None:
    if variables:
        # XLA reads only variables that are on the device that it compiles for.
        no_xla = trace.jit and not trace.alone
        raise TraceAgain(as_variables=variables, no_xla=no_xla, apart=apart)


def _resources(trace: Trace) -> None:
    """Variables and tables that are not Keras', and what else TensorFlow orders calls by."""
    if trace.alone:
        return
    handles = [(outer, users) for outer, users in trace.captured() if set(users) - _READS]
    known = trace.variables()
    for outer, users in handles:
        name = name_of(trace.tower.template, outer)
        if id(outer) in known:
            name = f"variable {known[id(outer)].path!r}"
        is_table = bool(set(users) & set(_CHANGES_TABLE))
        if is_table or any(user.startswith(_ASSIGNS) and user not in _READS for user in users):
            _refuse_change(trace.tower.template, name, is_table=is_table)
        elif trace.talks:
            refuse(
                trace.tower.template,
                f"Layers add up over all towers, but towers wait for each other to use {name}",
                "without synchronized=True",
            )


def refuse(template: keras.Model, what: str, remedy: str) -> None:
    """Refuses what each tower would do where one device does it once.

    Args:
        template: The model.
        what: Sentence that names the layer.
        remedy: How to do it instead.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{what}. Each of several towers would do it, where one device does it once. "
        f"Received: template={template.name!r}. Do it {remedy}, or use one device: devices=1."
    )


@contextlib.contextmanager
def look_at_untraced(template: keras.Model) -> Iterator[None]:
    """Looks at what a tower that has no graph does inside.

    Args:
        template: The model.

    Raises:
        ValueError: If it changes what is not Keras' and not traced.
    """
    outside = Outside(template)
    before = outside.values()
    yield
    for (name, is_table, old), (*_, new) in zip(before, outside.values(), strict=True):
        same = len(old) == len(new) and all(map(np.array_equal, old, new))
        if not same:
            _refuse_change(template, name, is_table=is_table)


def _refuse_change(template: keras.Model, name: str, *, is_table: bool) -> None:
    if is_table:
        refuse(template, f"The model changes a table: {name}", "outside of its call")
    refuse(
        template,
        f"The model assigns to {name}, in a way that Keras does not see",
        "with a variable of Keras (self.add_weight(...), keras.random.SeedGenerator())",
    )


def _weights(trace: Trace) -> None:
    """Weights that something else than Keras reads, such as a function that was loaded."""
    known = trace.variables()
    missing = [
        known[id(outer)]
        for outer, _ in trace.captured()
        if id(outer) in known
        and trace.tower.index(known[id(outer)]) not in trace.needs.as_variables
    ]
    _read_as_variables(trace, [variable for variable in missing if variable.trainable])


def _mixing(trace: Trace) -> None:
    """Layers that look at several rows at once: no error, as it may be meant so, but said."""
    if trace.alone:
        return
    names = Names(trace.tower.template)
    parts = trace.parts()
    found = (
        op
        for op, tensors in may_mix(trace.by_type, names.may_mix)
        if any(depends_on(tensor, parts) for tensor in tensors)
    )
    op = next(found, None)
    if op is None or not values_are_known():
        return
    joins = trace.tower.joins()
    if joins and "mixed" not in joins:
        return
    layer = names.layer(op.name)
    sure = (
        "Other numbers than on one device: the outputs of %s for a batch are not those for its "
        "parts, so it looks at several rows at once, likely in layer %r (%s), and each device has "
        "only some of them. Compute it from the merged outputs, in the loss or in a train_step of "
        "the model's own. parallel_keras.verify(parallel, batch) shows what differs."
    )
    unsure = (
        "Maybe other numbers than on one device: %s may look at several rows at once in layer %r "
        "(%s), of which each device has only some. It could not be tried on a few random rows. "
        "parallel_keras.verify(parallel, batch) shows whether something differs."
    )
    warn_once(
        trace.tower.template,
        sure if joins else unsure,
        trace.tower.template.name,
        layer.name if layer is not None else "",
        op.type,
    )


def _constant_seeds(trace: Trace) -> None:
    """Random numbers for rows that are the same wherever they are drawn: said, as documented."""
    if trace.alone:
        return
    seeded = trace.by_type["StatelessRandomGetKeyCounter"]
    if not seeded:
        return
    parts = trace.parts()
    rows = {tensor.shape[0] for tensor in parts if tensor.shape.rank} - {None}
    given = [op.outputs[0] for op in trace.by_type["Placeholder"]]
    for op in seeded:
        if depends_on(op.inputs[0], given):
            continue
        draws = [user for user in op.outputs[0].consumers() if user.type.startswith("Stateless")]
        by_rows = [
            draw
            for draw in draws
            if draw.outputs[0].shape.rank != 0
            and (depends_on(draw.inputs[0], parts) or draw.outputs[0].shape[:1][0] in rows)
        ]
        if by_rows:
            layer = Names(trace.tower.template).layer(op.name)
            warn_once(
                trace.tower.template,
                "Other numbers than on one device: %s draws random numbers for each row from a "
                "constant seed (%s), so each device draws the same ones for its rows. Draw them "
                "with a keras.random.SeedGenerator, which gives each device a stream of its own.",
                f"layer {layer.name!r}" if layer is not None else trace.tower.template.name,
                by_rows[0].type,
            )
            return


_TABLE: tuple[Callable[[Trace], None], ...] = (
    _streams,
    look_for_hidden,
    _resources,
    _weights,
    _mixing,
    _constant_seeds,
)
