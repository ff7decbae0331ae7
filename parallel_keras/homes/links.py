"""What joins two devices: shared memory, or a link on which every message costs something."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from parallel_keras.devices import resolve


def canonical(device: str) -> str:
    """The name of a device as TensorFlow lists it, whatever tensors say that they are on.

    Args:
        device: Name of a device that exists, or `""`.

    Returns:
        A name such as those in `DataParallelModel.devices`.
    """
    try:
        return resolve([device])[0]
    except ValueError:
        return device


def is_gpu(device: str) -> bool:
    """Whether a device is a GPU, or another one with a memory of its own."""
    return tf.DeviceSpec.from_string(device).device_type not in (None, "CPU")


def is_remote(device: str) -> bool:
    """Whether a device belongs to another process, which may be on another machine."""
    spec = tf.DeviceSpec.from_string(device)
    with tf.init_scope(), tf.device("/CPU:0"):
        here = tf.DeviceSpec.from_string(tf.constant(0).device)
    return (spec.job or here.job, spec.task or 0) != (here.job, here.task)


def are_far(devices: Iterable[str]) -> bool:
    """Whether what these devices tell each other goes over a link.

    The one place that decides it. On a link each message costs time of its own, so small
    tensors are packed into one; and it carries while devices compute, so towers are put
    into the graph of the step, where the gradients of late layers travel while early ones
    are computed. Between the logical CPUs of one process nothing travels: a message is a
    pointer, packing is a copy, and towers that are kept as calls start and run faster.

    Args:
        devices: Names of devices.

    Returns:
        `False` if they share one memory.
    """
    apart = set(devices)
    return len(apart) > 1 and any(is_gpu(device) or is_remote(device) for device in apart)


def all_by_device(check: Callable[[list[Any]], tf.Tensor], tensors: Sequence[Any]) -> tf.Tensor:
    """Whether a check holds for all tensors: each device tells one answer, not one for each.

    Args:
        check: Function from some of the tensors to a bool tensor `()`.
        tensors: Tensors, `tf.IndexedSlices` or `None`.

    Returns:
        A bool tensor `()`.
    """
    places: dict[str, list[Any]] = {}
    for tensor in tensors:
        if tensor is not None:
            places.setdefault(tensor.device or "", []).append(tensor)
    answers = []
    for place, some in places.items():
        with tf.device(place or None):
            answers.append(check(some))
    return tf.reduce_all(tf.stack(answers))
