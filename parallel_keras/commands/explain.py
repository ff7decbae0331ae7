"""Says where the time of a training step of a saved model goes, and what would make it faster.

The model is a .keras file. It is trained for a few steps on random rows of its input's shape, on
one device and on several, and the pieces of a step are timed; the file is not changed. A model that
was saved without compile arguments is given Adam and mean squared error.
"""

from __future__ import annotations

import json
from pathlib import Path

import keras
from absl import flags

import parallel_keras as pk
from parallel_keras.commands import CommandError
from parallel_keras.commands.machine import choose_devices
from parallel_keras.explaining.random_batch import random_batch

_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "How many devices to use. By default, all GPUs, or two logical CPUs if there is no GPU.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch-size", 64, "Rows of a batch, of all devices together.", lower_bound=1
)
_UNKNOWN = flags.DEFINE_integer(
    "length", 32, "The size of input axes that the model leaves open.", lower_bound=1
)
_LOSS_ON = flags.DEFINE_enum(
    "loss-on", "auto", ["auto", "merged", "towers"], "As in DataParallelModel."
)
_REPEATS = flags.DEFINE_integer("repeats", 20, "How often each piece is timed.", lower_bound=1)
_PICTURE = flags.DEFINE_string(
    "picture", None, "Where to draw the timeline of a step: a .png, .svg or .pdf file."
)
_JSON = flags.DEFINE_bool("json", False, "Print the result as JSON.")


def main(model: str) -> None:
    """Prints the times and the verdict."""
    devices = choose_devices(_DEVICES.value)
    template = _load(model)
    if not template.compiled:
        template.compile(optimizer="adam", loss="mean_squared_error")
    parallel = pk.DataParallelModel(template, devices, loss_on=_LOSS_ON.value)
    batch = random_batch(template, _BATCH_SIZE.value, _UNKNOWN.value)
    explanation = pk.explain(parallel, batch, repeats=_REPEATS.value)
    print(json.dumps(explanation.as_dict()) if _JSON.value else explanation)
    if _PICTURE.value is not None:
        try:
            explanation.draw(_PICTURE.value)
        except (ImportError, OSError, ValueError) as error:
            raise CommandError(f"Cannot draw {_PICTURE.value}: {error}") from error


def _load(path: str) -> keras.Model:
    if not Path(path).is_file():
        raise CommandError(
            f"There is no such file. Expected: a .keras file. Received: model={path!r}. "
            "Save one with parallel.save('model.keras')."
        )
    try:
        model = keras.saving.load_model(path)
    except (TypeError, ValueError, OSError) as error:
        raise CommandError(
            f"Keras cannot load {path}: {error} If it has classes of your own, call "
            "parallel_keras.explain(parallel, batch) from your script instead."
        ) from error
    if not getattr(model, "inputs", None):
        raise CommandError(
            "The shape of a batch is only known of Sequential and Functional models. "
            f"Received: a model of type {type(model).__name__}. Call "
            "parallel_keras.explain(parallel, batch) from your script instead."
        )
    return model
