"""Makes the variables of a step before it is traced.

TensorFlow traces a step a second time where the first trace made variables; for a
deep model that doubles the time to the first step.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.nests import (
    floats,
    is_dense,
    is_ragged,
    is_tensor,
    knows_more,
    mapped,
    of_any_rows,
    present,
    symbols,
)


def before_first_step(
    function: Callable[[Any], Any], build: Callable[[Any], None]
) -> Callable[[Any], Any]:
    """A step function that builds what it needs from the spec of its first batch.

    Args:
        function: What Keras made: takes an iterator and runs a step.
        build: Function from the spec of a batch, a nest.

    Returns:
        A function like the one given.
    """
    built = False

    def step(iterator: Any) -> Any:
        nonlocal built
        if not built:
            spec, iterator = _with_spec(iterator)
            if spec is not None:
                build(spec)
        built = True
        return function(iterator)

    return step


def _with_spec(iterator: Any) -> tuple[Any, Any]:
    """The spec of what an iterator gives, `None` if that is not known, and the same iterator."""
    if isinstance(iterator, tf.data.Iterator):
        return iterator.element_spec, iterator
    if not isinstance(iterator, Iterator):
        return None, iterator
    first = list(itertools.islice(iterator, 1))
    whole = itertools.chain(first, iterator)
    arrays = [leaf for leaf in keras.tree.flatten(first) if leaf is not None]
    if not arrays or not all(isinstance(leaf, (tf.Tensor, np.ndarray)) for leaf in arrays):
        return None, whole
    return keras.tree.map_structure(_spec_of_any_rows, first[0]), whole


def _spec_of_any_rows(array: Any) -> tf.TensorSpec | None:
    if array is None:
        return None
    shape = [None, *array.shape[1:]] if len(array.shape) else []
    return tf.TensorSpec(shape, tf.as_dtype(array.dtype))


def build_template(template: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes a model's weights from the shapes and dtypes of a batch.

    Args:
        template: The model.
        args: Positional arguments of a call, or their specs.
        kwargs: Keyword arguments of a call.
    """
    original = template.call

    def call(*args: Any, **kwargs: Any) -> Any:
        """Keras makes a node of the result, which must not hold classes that it does not know."""
        outputs = original(*args, **kwargs)
        return list(floats(outputs)) if knows_more(outputs) else outputs

    # Weights go where they would go without the wrapper.
    with tf.device(None), calling(template, functools.wraps(original)(call)):
        if any(map(is_ragged, keras.tree.flatten(args))):
            specs = keras.tree.map_structure(of_any_rows, args)
            unknown = TypeError(f"Keras has no symbols of ragged tensors. Received: {specs}.")
            _compat.trace_as_step(template, specs, kwargs, unknown)
            return
        given = symbols(args)
        if isinstance(template, keras.Sequential):
            # It keeps the shape for good, and would have a batch size of that batch.
            given = mapped(_of_any_rows, given)
        try:
            template(*given, **kwargs)
        except Exception as error:  # noqa: BLE001 (it is raised again if this fails, too)
            _build_otherwise(template, args, kwargs, error)


def _of_any_rows(symbol: keras.KerasTensor) -> keras.KerasTensor:
    shape = (None, *symbol.shape[1:]) if symbol.shape else ()
    return keras.KerasTensor(shape, symbol.dtype, sparse=symbol.sparse)


def build_eagerly(
    template: keras.Model, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Makes what is left of a model that Keras cannot build, as it runs only eagerly.

    Args:
        template: The model.
        call: Its `call`.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of a call.
    """
    built = all(layer.built for layer in _compat.all_layers(template))
    if not built and tf.executing_eagerly():
        with keras.StatelessScope():  # Nothing is assigned.
            call(*args, **kwargs)


def _build_otherwise(
    template: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> None:
    """Makes weights where Keras cannot find out shapes."""
    try:
        _compat.trace_as_step(template, args, kwargs, error)
    except Exception:
        if not tf.executing_eagerly() or not all(map(is_tensor, keras.tree.flatten(args))):
            raise
        # A model that only runs eagerly: on the batch itself, and nothing is assigned.
        with keras.StatelessScope():
            template(*args, **kwargs)


def build_for_step(model: keras.Model, spec: Any, *, training: bool) -> None:
    """Makes what the step of a compiled model needs: weights, losses, metrics, optimizer.

    Args:
        model: The model, with its `template`.
        spec: The spec of a batch, as Keras' data sets have it.
        training: Whether the optimizer is needed.
    """
    data = keras.utils.unpack_x_y_sample_weight(present(spec))
    if not is_dense(data):
        return
    if not model.template.built:
        build_template(model.template, (data[0],), {})
    build_losses_and_metrics(model, data)
    if training and model.optimizer is not None and not model.optimizer.built:
        _build_optimizer(model.optimizer, model.trainable_variables)


def _build_optimizer(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> None:
    """Makes the optimizer's variables as the first trace of a step would.

    Not in a trace: that takes ten times as long, as much as a deep model does. But what an
    optimizer assigns while it is built is part of the traced step, which is thrown away, so it
    is left out here. `ScheduleFreeAdamW` assigns so, and would take other steps.
    """
    with contextlib.ExitStack() as stack:

        def make(next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
            variable = next_creator(**kwargs)
            stack.enter_context(_unassigned(variable))
            return variable

        for known in (*variables, *optimizer.variables):
            stack.enter_context(_unassigned(known.value))
        stack.enter_context(tf.variable_creator_scope(make))
        # By its path a variable is found in a legacy file: as where a step makes it.
        stack.enter_context(keras.name_scope(optimizer.name, caller=optimizer))
        optimizer.build(variables)


@contextlib.contextmanager
def _unassigned(variable: tf.Variable) -> Iterator[None]:
    """Inside, a variable keeps its value, whatever is assigned to it."""
    names = ("assign", "assign_add", "assign_sub")
    for name in names:  # In the object, where Python finds it before the class.
        setattr(variable, name, lambda *_, **__: variable)
    try:
        yield
    finally:
        for name in names:
            vars(variable).pop(name, None)


def build_losses_and_metrics(model: keras.Model, data: tuple[Any, Any, Any]) -> None:
    """Makes the variables of the compiled losses and metrics.

    Args:
        model: The compiled model, whose `template` is built.
        data: Inputs, targets and sample weights of a batch, or their specs, dense.
    """
    _compat.build_losses_and_metrics(model, symbols(data))
