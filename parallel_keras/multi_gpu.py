"""The contract of `keras.utils.multi_gpu_model`, which was removed in 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras.devices import resolve
from parallel_keras.model import DataParallelModel


def multi_gpu_model(
    model: keras.Model,
    gpus: int | Sequence[int | str] | None = None,
    cpu_merge: bool = True,
    cpu_relocation: bool = False,
) -> DataParallelModel:
    """Runs a model on several GPUs, under its old name and arguments.

    Scripts written for `keras.utils.multi_gpu_model` go on working with the
    import changed. New ones should use `DataParallelModel`, which also runs on
    one device. Unlike its predecessor it gives the numbers of one device for
    any batch size, and what it returns can be saved.

    Args:
        model: `keras.Model`.
        gpus: Int of at least 2, the first that many GPUs; a list of at least 2
            GPU ids (or device names, to try a script on CPUs); or `None` for
            all GPUs. Defaults to `None`.
        cpu_merge: Bool, whether the CPU merges outputs and gradients, else the
            first GPU. Defaults to `True`.
        cpu_relocation: Bool, whether the weights, and what an optimizer keeps
            for them, move to the CPU. They are moved in place: the model itself
            is trained, not a copy of it. Defaults to `False`.

    Returns:
        A `DataParallelModel`.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there are fewer than 2 devices, or not those asked for, or
            if weights are to be moved that do not exist yet.

    Example:
    >>> from parallel_keras import multi_gpu_model
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> parallel = multi_gpu_model(model, gpus=["CPU:0", "CPU:1"])
    >>> parallel.num_towers
    2
    """
    devices = _at_least_two(gpus)
    merge_device = "/CPU:0" if cpu_merge else devices[0]
    weights_on = "/CPU:0" if cpu_relocation else "auto"
    if cpu_relocation and isinstance(model, keras.Model):
        _check_built(model)
    return DataParallelModel(model, devices, merge_device=merge_device, weights_on=weights_on)


def _at_least_two(gpus: Any) -> list[str]:
    existing = [device.name for device in tf.config.list_logical_devices("GPU")]
    # All of them, as the old function had it: without a GPU, its list would else be empty.
    everything = [device.name for device in tf.config.list_logical_devices()]
    advice = (
        f"Devices of this machine: {everything}. For one device, or CPUs, use DataParallelModel."
    )
    if gpus is None or (isinstance(gpus, int) and not isinstance(gpus, bool)):
        wanted = len(existing) if gpus is None else gpus
        if wanted < 2 or wanted > len(existing):
            raise ValueError(
                "Expected `gpus` to be at least 2 and at most the number of GPUs. "
                f"Received: gpus={gpus}. {advice}"
            )
        return existing[:wanted]
    devices = resolve(gpus)
    if len(devices) < 2:
        raise ValueError(
            f"Expected `gpus` to name at least 2 devices. Received: gpus={list(gpus)}. {advice}"
        )
    return list(devices)


def _check_built(model: keras.Model) -> None:
    if not model.built:
        raise ValueError(
            "cpu_relocation moves the weights of a model, but this one has none yet. "
            f"Received: model={model.name!r}, not built. Call it on a batch, or "
            "model.build(input_shape), or build it inside tf.device('/CPU:0')."
        )
