"""A model of a command, wrapped for the devices that it asks for. Starts TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence

import parallel_keras as pk
from parallel_keras.commands import CommandError
from parallel_keras.commands.machine import choose_devices
from parallel_keras.measuring import models, subject


def wrap(
    name: str,
    *,
    devices: int | None,
    imports: Sequence[str],
    loss: str | None,
    loss_on: str = "auto",
    function: str,
) -> pk.DataParallelModel:
    """The model of that name on several devices, compiled.

    Args:
        name: String that `machine.choose_model` returned.
        devices: Int, how many, or `None` for what the machine has.
        imports: Names of modules with classes of the model.
        loss: String, the loss to compile with; `None` for what the file says.
        loss_on: String, as in `DataParallelModel`. Defaults to `"auto"`.
        function: String, what to call from a script where the command cannot load the model.

    Returns:
        The `DataParallelModel`. A model without compile arguments gets Adam and a loss.
    """
    chosen = choose_devices(devices)
    try:
        template = models.load(name, imports)
    except (ImportError, ValueError) as error:
        raise CommandError(
            f"{error} Or call parallel_keras.{function}(parallel, batch) from your script."
        ) from error
    if loss or not template.compiled:
        subject.compile_with(template, loss)
    return pk.DataParallelModel(template, chosen, loss_on=loss_on)
