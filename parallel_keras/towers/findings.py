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

Most models do nothing of this, and the look is all that they pay. What is neither refused nor made
right, as it may be meant so, is in `other_numbers.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras.towers.naming import Outside, name_of
from parallel_keras.towers.needs import TraceAgain
from parallel_keras.towers.seeds import is_seed
from parallel_keras.towers.trace import Trace

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


_TABLE: tuple[Callable[[Trace], None], ...] = (
    _streams,
    look_for_hidden,
    _resources,
    _weights,
)
