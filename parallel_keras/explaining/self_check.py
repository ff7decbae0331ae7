"""Copies known numbers between devices, to find a pair that does not copy right.

A machine whose devices do not copy right shows GPUs at 100 % without progress, or losses that are
not a number, and only with two or more of them
(https://github.com/tensorflow/tensorflow/issues/44976).
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

Numbers = npt.NDArray[np.float32]
Copy = Callable[[Numbers, str, str], Numbers]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A pair of devices that does not copy right.

    Attributes:
        source: String, the device that was copied from.
        target: String, the device that was copied to.
        kind: String, `"hangs"`, `"corrupt"` or `"fails"`.
        detail: String, what was seen.
    """

    source: str
    target: str
    kind: str
    detail: str


def copy_between(numbers: Numbers, source: str, target: str) -> Numbers:
    """Puts numbers on one device, copies them to another, and reads them there.

    Args:
        numbers: Array of any shape.
        source: String, name of a device.
        target: String, name of another.

    Returns:
        What arrived.

    Raises:
        RuntimeError: If TensorFlow did not use the devices.
    """
    # Sums, so that something is computed on both: a mere copy could come from the host.
    with tf.device(source):
        there = tf.constant(numbers) + tf.zeros(numbers.shape)
    with tf.device(target):
        here = tf.identity(there) + tf.zeros(numbers.shape)
    for tensor, device in ((there, source), (here, target)):
        # TensorFlow takes another device, without a word, where one cannot be had.
        if not tensor.device.endswith(device):
            raise RuntimeError(
                f"Expected the numbers on {device}, but TensorFlow put them elsewhere. "
                f"Received: device={tensor.device!r}. Run: python -m parallel_keras devices."
            )
    return here.numpy()


def check_copies(
    devices: Sequence[str],
    *,
    copy: Copy = copy_between,
    timeout: float = 10.0,
    count: int = 1 << 20,
) -> list[Fault]:
    """Copies known numbers from each device to each other one.

    A copy that hangs cannot be stopped: its thread goes on, and the process may have to be ended
    by `os._exit`.

    Args:
        devices: Sequence of device names.
        copy: Function `(numbers, source, target) -> numbers`, what is checked. Defaults to
            `copy_between`.
        timeout: Float, seconds that one copy may take. Defaults to `10.0`.
        count: Int, how many float32 numbers are copied. Defaults to a million (4 MB).

    Returns:
        A list with a `Fault` for each pair that does not copy right.

    Example: every fourth number is lost on the way to one device.

    >>> from parallel_keras.explaining import self_check
    >>> def copy(numbers, source, target):
    ...     if target == "GPU:1":
    ...         numbers[::4] = 0
    ...     return numbers
    >>> [fault] = self_check.check_copies(["GPU:0", "GPU:1"], copy=copy, count=100)
    >>> fault.source, fault.target, fault.kind, fault.detail
    ('GPU:0', 'GPU:1', 'corrupt', '25 of 100 numbers arrived changed')
    """
    faults = []
    for number, (source, target) in enumerate(itertools.permutations(devices, 2)):
        # Other numbers for each pair: what a pair before it left behind must not pass for right.
        numbers = np.arange(count, dtype=np.float32) + np.float32(1 + number)
        fault = _check_pair(numbers, source, target, copy, timeout)
        faults += [] if fault is None else [fault]
    return faults


def _check_pair(
    numbers: Numbers, source: str, target: str, copy: Copy, timeout: float
) -> Fault | None:
    answers: queue.SimpleQueue[Numbers | Exception] = queue.SimpleQueue()
    threading.Thread(
        target=_answer, args=(answers, copy, numbers.copy(), source, target), daemon=True
    ).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        return Fault(source, target, "hangs", f"nothing arrived within {timeout:g} s")
    if isinstance(answer, Exception):
        message = " ".join(str(answer).split())
        return Fault(source, target, "fails", f"{type(answer).__name__}: {message}")
    if answer.shape != numbers.shape:
        return Fault(source, target, "corrupt", f"{answer.shape} arrived of {numbers.shape}")
    wrong = int(np.sum(answer != numbers))
    if wrong:
        return Fault(
            source, target, "corrupt", f"{wrong} of {numbers.size} numbers arrived changed"
        )
    return None


def _answer(answers: Any, copy: Copy, numbers: Numbers, source: str, target: str) -> None:
    try:
        answers.put(copy(numbers, source, target))
    except (tf.errors.OpError, RuntimeError, ValueError, OSError) as error:
        answers.put(error)
