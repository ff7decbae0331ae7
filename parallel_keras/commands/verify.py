"""Compares a step of a model on several devices with the same step on one.

The model is a saved file, or one of keras.applications. It takes one training step, one evaluation
and one prediction on random rows of its input's shape, on one device and on several, from the same
weights; the file is not changed. Ends with 1 where a number differs. A model that was saved without
compile arguments is given Adam and mean squared error.
"""

from __future__ import annotations

import json

from absl import flags

from parallel_keras.commands import EXIT_FAILURE, _flags

_MODEL = _flags.define_model()
_DEVICES = _flags.define_devices()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch-size",
    None,
    "Rows of the batch. By default 1 more than twice the devices, which they do not divide.",
    lower_bound=1,
)
_OPEN_SIZE = _flags.define_open_size()
_LOSS = _flags.define_loss()
_IMPORTS = _flags.define_imports()
_JSON = _flags.define_json()


def main(model: str | None = None) -> int:
    """Prints what is the same and what is not."""
    from parallel_keras.commands.machine import choose_model  # starts TensorFlow

    name = choose_model(model, _MODEL.value)
    import parallel_keras as pk
    from parallel_keras.commands._wrapped import wrap
    from parallel_keras.measuring.random_batch import random_batch

    parallel = wrap(
        name,
        devices=_DEVICES.value,
        imports=_IMPORTS.value,
        loss=_LOSS.value,
        function="verify",
    )
    rows = _BATCH_SIZE.value or 2 * parallel.num_towers + 1
    found = pk.verify(parallel, random_batch(parallel.template, rows, _OPEN_SIZE.value))
    print(json.dumps(found.as_dict()) if _JSON.value else found)
    return 0 if found.equal else EXIT_FAILURE
