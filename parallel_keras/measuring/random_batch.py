"""Random rows that fit a model, to time it where its data is not at hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def random_batch(model: keras.Model, rows: int, open_size: int = 128) -> tuple[Any, Any]:
    """Inputs of a model, and targets that its loss takes.

    Args:
        model: `keras.Model`, compiled, Sequential or Functional.
        rows: Int, the rows of the batch.
        open_size: Int, the size of axes that the inputs leave open. Defaults to `128`.

    Returns:
        A tuple of the nests of inputs and targets, arrays of shape `(rows, ...)`. Floats are
        drawn from `[0, 1)`, integers are 0 or 1, which any vocabulary holds. Targets have the
        shape of the outputs, without the last axis and 0 for losses that take class indices.

    Example:
    >>> from parallel_keras.measuring import random_batch
    >>> model = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(5)])
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x, y = random_batch.random_batch(model, rows=4, open_size=7)
    >>> x.shape, x.dtype, y.shape, y.dtype
    ((4, 7, 3), dtype('float32'), (4, 7), dtype('int32'))
    """
    random = np.random.default_rng(0)

    def make(tensor: Any) -> Any:
        shape = [rows, *(open_size if size is None else size for size in tensor.shape[1:])]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype == "string":
            return np.full(shape, "", "object")
        if "float" in dtype:
            return random.random(shape).astype(dtype)
        return random.integers(0, 2, shape).astype(dtype)

    # A loaded Sequential model has `inputs`, but no `input` before its first call.
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    x = keras.tree.map_structure(make, inputs)
    outputs = model.compute_output_spec(
        keras.tree.map_structure(lambda like, one: _symbol(one, like.dtype), inputs, x)
    )
    losses = iter(_losses(model, outputs))

    def target(output: Any) -> Any:
        if _takes_classes(next(losses)):
            return np.zeros(output.shape[:-1], "int32")
        return random.random(output.shape).astype("float32")

    return x, keras.tree.map_structure(target, outputs)


def _symbol(array: Any, dtype: Any) -> keras.KerasTensor:
    return keras.KerasTensor(array.shape, dtype)


def _losses(model: keras.Model, outputs: Any) -> list[Any]:
    """The loss of each output, in the order of the flat outputs."""
    paths = [path for path, _ in keras.tree.flatten_with_path(outputs)]
    if isinstance(model.loss, dict):
        names = [
            path[-1] if path and isinstance(path[-1], str) else model.output_names[index]
            for index, path in enumerate(paths)
        ]
        return [model.loss.get(name) for name in names]
    if isinstance(model.loss, (list, tuple)):
        return list(keras.tree.flatten(model.loss))
    return [model.loss] * len(paths)


def _takes_classes(loss: Any) -> bool:
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return name.lower().startswith("sparse")
