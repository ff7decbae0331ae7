"""Which devices a command runs on; for commands that take a number of them."""

from __future__ import annotations

import tensorflow as tf

import parallel_keras as pk
from parallel_keras.commands import CommandError


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
