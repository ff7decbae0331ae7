"""From the name of an application or a saved file to a compiled model and a random batch.

Run as a module with a JSON `Subject`, this is a worker of `python -m parallel_keras bench`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import parallel_keras as pk
from parallel_keras.measuring.worker import Contender, prepare, serve


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one worker of `bench` trains.

    Attributes:
        model: String, a name from `keras.applications` or the path to a saved model.
        devices: Int, how many to use.
        wrapped: Whether in a `DataParallelModel`; else the model itself, on the first device.
        batch_size: Int, rows of the whole batch.
        open_size: Int, the size of axes that the model leaves open, besides that of the batch.
        loss: String, the name of the loss; if `None`, the one in the file.
        imports: Names of modules to import first.
        core: Int or `None`, the one CPU core to use.
    """

    model: str
    devices: int
    wrapped: bool
    batch_size: int
    open_size: int
    loss: str | None = None
    imports: Sequence[str] = ()
    core: int | None = None


def applications() -> list[str]:
    """The names of the models in `keras.applications`.

    Example:
    >>> "Xception" in applications()
    True
    """
    return sorted(name for name in dir(keras.applications) if name[:1].isupper())


def check_name(name: str) -> None:
    """Whether there is a model of that name.

    Args:
        name: String, a name in `applications()` or a path.

    Raises:
        ValueError: If it is neither.
    """
    if name not in applications() and not Path(name).exists():
        raise ValueError(
            "There is no file and no application of that name. "
            f"Received: model={name!r}. Expected: the path to a saved model, or one of "
            f"{', '.join(applications())}."
        )


def load(name: str) -> keras.Model:
    """The model of that name, with random weights, or from that file.

    Args:
        name: String that `check_name` takes.

    Returns:
        The model.
    """
    if name in applications():
        model: keras.Model = getattr(keras.applications, name)(
            weights=None, classifier_activation=None
        )
        return model
    return keras.saving.load_model(name)


def compile_with(model: keras.Model, loss: str | None) -> None:
    """Compiles a model with its own optimizer and loss, so far as it has them.

    Args:
        model: The model, as loaded.
        loss: String, the name of a loss to take instead of its own, or `None`. Without either it
            is the mean squared error, which takes targets of any shape.
    """
    compiled = getattr(model, "compiled", False)
    optimizer = model.optimizer if compiled else keras.optimizers.Adam(1e-5)
    own = model.loss if compiled else None
    # Keras hands a model on one GPU to XLA, but none on several: that would compare compilers.
    model.compile(optimizer, loss or own or "mean_squared_error", jit_compile=False)


def random_batch(model: keras.Model, rows: int, open_size: int) -> tuple[Any, Any]:
    """Random inputs of a model, and targets that its loss takes.

    Inputs of integer dtype are 0 or 1, which any vocabulary holds. Targets are shaped like the
    outputs; those of losses named `sparse...` are the class 0.

    Args:
        model: The compiled model.
        rows: Int, the rows of the batch.
        open_size: Int, the size of axes that the model leaves open.

    Returns:
        Inputs and targets, nested as the model's are.

    Raises:
        ValueError: If the model does not know the shape of its inputs.
    """
    random = np.random.default_rng(0)

    def shape(tensor: Any) -> tuple[int, ...]:
        return (rows, *(size or open_size for size in tensor.shape[1:]))

    def value(tensor: Any) -> Any:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "int" in dtype:
            return random.integers(0, 2, shape(tensor)).astype(dtype)
        return random.normal(size=shape(tensor)).astype("float32")

    x = keras.tree.map_structure(value, _inputs(model))
    outputs = model.compute_output_spec(keras.tree.map_structure(_symbol, x))
    if "sparse" in _name(model.loss):
        return x, keras.tree.map_structure(lambda out: np.zeros(shape(out)[:-1], "int32"), outputs)
    return x, keras.tree.map_structure(lambda out: random.random(shape(out), "float32"), outputs)


def contender(subject: Subject, devices: Sequence[str]) -> Contender:
    """The model of a subject, wrapped if asked for, with its batch."""
    for module in subject.imports:
        importlib.import_module(module)
    keras.utils.set_random_seed(0)
    model = load(subject.model)
    compile_with(model, subject.loss)
    x, y = random_batch(model, subject.batch_size, subject.open_size)
    wrapped = pk.DataParallelModel(model, list(devices)) if subject.wrapped else model
    return Contender(wrapped, x, y)


def _inputs(model: keras.Model) -> Any:
    if inputs := getattr(model, "inputs", None):
        # A Sequential that nobody has called has `inputs`, but no `input`.
        return inputs[0] if isinstance(model, keras.Sequential) else model.input
    raise ValueError(
        "Expected a Functional or Sequential model that knows the shape of its inputs. "
        f"Received: model={model.name!r} (of type {type(model).__name__}). "
        "Call it on keras.Input(...) and save keras.Model(inputs, outputs) instead."
    )


def _symbol(array: Any) -> keras.KerasTensor:
    return keras.KerasTensor(array.shape, array.dtype)


def _name(loss: Any) -> str:
    name = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    return str(name).lower()


def main() -> None:
    """Serves the subject that the first argument describes."""
    subject = Subject(**json.loads(sys.argv[1]))
    devices = prepare(subject.devices, subject.core)
    serve(lambda: contender(subject, devices))


if __name__ == "__main__":
    main()
