"""From the name of an application or a saved file to a compiled model and a random batch.

Run as a module with a JSON `Subject`, this is a runner of `python -m parallel_keras bench`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import keras

import parallel_keras as pk
from parallel_keras.measuring.models import load
from parallel_keras.measuring.random_batch import random_batch
from parallel_keras.measuring.runner import Contender, prepare, serve


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one runner of `bench` trains.

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


def compile_with(model: keras.Model, loss: str | None) -> None:
    """Compiles a model with its own optimizer and loss, so far as it has them.

    Args:
        model: The model, as loaded.
        loss: String, the name of a loss to take instead of its own, or `None`. Without either it
            is the mean squared error, which takes targets of any shape.
    """
    compiled = getattr(model, "compiled", False)
    optimizer = model.optimizer if compiled else keras.optimizers.Adam(1e-5)
    compiled_loss = model.loss if compiled else None
    # Keras hands a model on one GPU to XLA, but none on several: that would compare compilers.
    model.compile(optimizer, loss or compiled_loss or "mean_squared_error", jit_compile=False)


def contender(subject: Subject, devices: Sequence[str]) -> Contender:
    """The model of a subject, wrapped if asked for, with its batch."""
    keras.utils.set_random_seed(0)
    model = load(subject.model, subject.imports)
    compile_with(model, subject.loss)
    x, y = random_batch(model, subject.batch_size, subject.open_size)
    wrapped = pk.DataParallelModel(model, list(devices)) if subject.wrapped else model
    return Contender(wrapped, x, y)


def main() -> None:
    """Serves the subject that the first argument describes."""
    subject = Subject(**json.loads(sys.argv[1]))
    devices = prepare(subject.devices, subject.core)
    serve(lambda: contender(subject, devices))


if __name__ == "__main__":
    main()
