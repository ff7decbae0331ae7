"""Says where the time of a training step of a model goes, and what would make it faster.

The model is a saved file, or one of keras.applications. It is trained for a few steps on random
rows of its input's shape, on one device and on several, and the pieces of a step are timed; the
file is not changed. A model that was saved without compile arguments is given Adam and mean squared
error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from parallel_keras.commands import CommandError, _flags
from parallel_keras.commands._outputs import check_writable

if TYPE_CHECKING:
    from parallel_keras.explaining.explanation import Explanation

_MODEL = _flags.define_model()
_DEVICES = _flags.define_devices()
_BATCH_SIZE = _flags.define_batch_size()
_OPEN_SIZE = _flags.define_open_size()
_LOSS = _flags.define_loss()
_IMPORTS = _flags.define_imports()
_LOSS_ON = flags.DEFINE_enum(
    "loss-on", "auto", ["auto", "merged", "towers"], "As in DataParallelModel."
)
_REPEATS = flags.DEFINE_integer("repeats", 20, "How often each piece is timed.", lower_bound=1)
_PICTURE = flags.DEFINE_string(
    "picture", None, "Where to draw the timeline of a step: a .png, .svg or .pdf file."
)
_JSON = _flags.define_json()


def main(model: str | None = None) -> None:
    """Prints the times and the verdict."""
    from parallel_keras.commands.machine import choose_model  # starts TensorFlow

    name = choose_model(model, _MODEL.value)
    if _PICTURE.value is not None:
        _check_picture(_PICTURE.value)
    explanation = _explain(name)
    print(json.dumps(explanation.as_dict()) if _JSON.value else explanation)
    if _PICTURE.value is not None:
        try:
            explanation.draw(_PICTURE.value)
        except (OSError, ValueError) as error:
            raise CommandError(f"Cannot draw {_PICTURE.value}: {error}") from error


def _explain(name: str) -> Explanation:
    import parallel_keras as pk
    from parallel_keras.commands._wrapped import wrap
    from parallel_keras.measuring.random_batch import random_batch

    parallel = wrap(
        name,
        devices=_DEVICES.value,
        imports=_IMPORTS.value,
        loss=_LOSS.value,
        loss_on=_LOSS_ON.value,
        function="explain",
    )
    batch = random_batch(parallel.template, _BATCH_SIZE.value, _OPEN_SIZE.value)
    return pk.explain(parallel, batch, repeats=_REPEATS.value)


def _check_picture(path: str) -> None:
    """Finds out before the work what would spoil its result."""
    try:
        from matplotlib.backends import backend_agg
    except ImportError as error:
        raise CommandError(
            "Drawing the timeline needs matplotlib, which is not installed. "
            f"Received: --picture={path}. Install: pip install matplotlib"
        ) from error
    endings = backend_agg.FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in endings:
        raise CommandError(
            f"There is no such kind of picture. Expected: a name that ends in .png, .svg or .pdf. "
            f"Received: --picture={path}."
        )
    check_writable(Path(path).absolute(), f"--picture={path}")
