"""Which devices a command runs on, and which model it takes."""

from __future__ import annotations

import tensorflow as tf

import parallel_keras as pk
from parallel_keras.commands import CommandError
from parallel_keras.measuring import models


def choose_devices(count: int | None) -> list[str]:
    """Returns the devices to use; has to be called before TensorFlow starts its runtime.

    Args:
        count: How many, or `None` for all GPUs, or two logical CPUs where there is no GPU.
    """
    gpus = len(tf.config.list_physical_devices("GPU"))
    if not gpus:
        # One thread for each operation makes a logical CPU use about one core, as a GPU that is
        # added brings cores of its own. The towers' operations run beside each other.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(2 * (count or 2))
        return list(pk.virtual_devices(count or 2))
    if count and count > gpus:
        raise CommandError(
            f"There are not as many GPUs as asked for. Expected: at most {gpus}. "
            f"Received: --devices={count}. Leave the flag out to use all of them."
        )
    return [f"/device:GPU:{index}" for index in range(count or gpus)]


def choose_model(argument: str | None, flag: str | None) -> str:
    """Returns the name of the model, once it is known that there is one.

    Args:
        argument: What stood on the command line, or `None`.
        flag: What `--model` said, or `None`.
    """
    given = {each for each in (argument, flag) if each}
    if len(given) != 1:
        raise CommandError(
            "Expected one model: a name from keras.applications, such as Xception, or the path to "
            f"a saved model. Received: model={argument!r}, --model={flag!r}."
        )
    [name] = given
    try:
        models.check_name(name)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return name
