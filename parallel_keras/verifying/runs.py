"""One training step, one evaluation and one prediction of a model, and all that they gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import tensors
from parallel_keras.verifying.model_state import METRIC, ModelState

Data = tuple[Any, Any, Any]
Numbers = dict[str, np.ndarray]


def run_steps(model: keras.Model, data: Data, state: ModelState) -> Numbers:
    """Runs the three steps, each from the same state.

    Args:
        model: The compiled model.
        data: Inputs, targets and sample weights of one batch.
        state: The `ModelState` to start from.

    Returns:
        A dict from what a number is called to its value.
    """
    numbers: Numbers = {}
    x, y, sample_weight = data
    state.restore()
    before = state.read()
    logs = model.train_on_batch(x, y, sample_weight, return_dict=True)
    numbers.update({f"train: {name}": np.asarray(value) for name, value in logs.items()})
    gradients = state.gradients().items()
    numbers.update({f"train: gradient of {name}": value for name, value in gradients})
    numbers.update(_assigned("train", before, state.read()))
    state.restore()
    before = state.read()
    logs = model.test_on_batch(x, y, sample_weight, return_dict=True)
    numbers.update({f"evaluate: {name}": np.asarray(value) for name, value in logs.items()})
    numbers.update(_assigned("evaluate", before, state.read()))
    state.restore()
    outputs = tensors(model.predict_on_batch(x))
    for index, value in enumerate(outputs):
        name = "predict: output" + (f" {index}" if len(outputs) > 1 else "")
        numbers[name] = np.asarray(value)
    return numbers


def permuted(data: Data, order: np.ndarray) -> Data:
    """The batch with its rows in another order."""

    def permute(leaf: Any) -> Any:
        return tf.gather(leaf, order) if tf.is_tensor(leaf) and leaf.shape.rank else leaf

    return keras.tree.map_structure(permute, data)


def in_order(numbers: Numbers, order: np.ndarray) -> Numbers:
    """The numbers of a permuted batch, predictions back in the order of its rows."""

    def back(name: str, value: np.ndarray) -> np.ndarray:
        by_rows = name.startswith("predict") and value.ndim and len(value) == len(order)
        return value[np.argsort(order)] if by_rows else value

    return {name: back(name, value) for name, value in numbers.items()}


@contextlib.contextmanager
def without_chance(template: keras.Model) -> Iterator[tuple[list[str], list[keras.layers.Layer]]]:
    """Inside, layers that drop or add noise at a rate do nothing.

    Args:
        template: The model.

    Yields:
        The names of the layers that were silenced, and the layers that draw random numbers
        and cannot be.
    """
    rates = ("rate", "stddev", "dropout", "recurrent_dropout")
    silenced: list[tuple[keras.layers.Layer, str, Any]] = []
    left = []
    for layer in _compat.all_layers(template):
        held = [rate for rate in rates if isinstance(vars(layer).get(rate), (int, float))]
        silenced += [(layer, rate, getattr(layer, rate)) for rate in held if getattr(layer, rate)]
        if not held and _draws(layer):
            left.append(layer)
    try:
        for layer, rate, _ in silenced:
            setattr(layer, rate, 0.0)
        yield list(dict.fromkeys(layer.name for layer, _, _ in silenced)), left
    finally:
        for layer, rate, value in silenced:
            setattr(layer, rate, value)


@contextlib.contextmanager
def traced_anew(models: Sequence[keras.Model]) -> Iterator[None]:
    """Steps are traced for what is inside, and anew for what comes after."""
    functions = ("train_function", "test_function", "predict_function")

    def forget() -> None:
        for model in models:
            for name in functions:
                setattr(model, name, None)

    forget()
    try:
        yield
    finally:
        forget()


def _draws(layer: keras.layers.Layer) -> bool:
    return any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())


def _assigned(step: str, before: Numbers, after: Numbers) -> Numbers:
    # Each model that is compiled has metrics of its own; their results are in the logs.
    return {
        f"{step}: {name}": value
        for name, value in after.items()
        if not name.startswith(METRIC)
        and (name not in before or not np.array_equal(before[name], value))
    }
