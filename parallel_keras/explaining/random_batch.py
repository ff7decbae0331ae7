"""Random rows that fit a model, to time it where its data is not at hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def random_batch(model: keras.Model, rows: int, length: int = 32) -> tuple[Any, Any]:
    """Inputs and targets of one batch.

    Args:
        model: `keras.Model`, compiled, Sequential or Functional.
        rows: Int, the rows of the batch.
        length: Int, the size of axes that the inputs leave open. Defaults to `32`.

    Returns:
        A tuple of the nests of inputs and targets, arrays of shape `(rows, ...)`. Floats are
        drawn from `[0, 1)`, integers are 0, so that they are in any vocabulary. Targets have the
        shape of the outputs, without the last axis for losses that take class indices.

    Example:
    >>> from parallel_keras.explaining import random_batch
    >>> model = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(5)])
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x, y = random_batch.random_batch(model, rows=4, length=7)
    >>> x.shape, x.dtype, y.shape, y.dtype
    ((4, 7, 3), dtype('float32'), (4, 7), dtype('int32'))
    """
    random = np.random.default_rng(0)

    def make(tensor: Any) -> Any:
        shape = [rows, *(length if size is None else size for size in tensor.shape[1:])]
        if "float" in tensor.dtype:
            return random.random(shape).astype(tensor.dtype)
        return np.zeros(shape, "object" if tensor.dtype == "string" else tensor.dtype)

    # A loaded Sequential model has `inputs`, but no `input` before its first call.
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    x = keras.tree.map_structure(make, inputs)
    outputs = keras.tree.map_structure(keras.ops.convert_to_numpy, model(x, training=False))
    losses = iter(_losses(model, outputs))

    def target(output: Any) -> Any:
        if _takes_classes(next(losses)):
            return np.zeros(output.shape[:-1], "int32")
        return random.random(output.shape).astype("float32")

    return x, keras.tree.map_structure(target, outputs)


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
