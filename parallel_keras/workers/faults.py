"""Which worker an error of the connection comes from."""

from __future__ import annotations

import re
import socket
from typing import Final

import tensorflow as tf

from parallel_keras.workers.cluster import Cluster, Task

ERRORS: Final = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)
_LONGEST_CALL: Final = 2.0
_TASK: Final = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)(?!\d|/device)")


def named(error: Exception, workers: Cluster, timeout: float) -> ConnectionError | None:
    """What to raise instead of an error of TensorFlow's.

    Args:
        error: The error.
        workers: The `Cluster`.
        timeout: Float, the seconds that a worker waits for the others.

    Returns:
        A `ConnectionError` that names the workers with their addresses; `None` if the
        error does not come from the connection.
    """
    text = str(error)
    if not ("ollective" in text or "task" in text or "remote" in text):
        return None
    told = [task for task in workers.others if _tells(text, task)]
    suspects = told or [task for task in workers.others if not _answers(task)]
    names = ", ".join(map(str, suspects or workers.others))
    state = (
        "is gone or cut off"
        if suspects
        else f"did not take its part within {timeout:g} s (each of them answers calls, so one is "
        "frozen, or busy with something that the others do not do)"
    )
    return ConnectionError(
        f"Training cannot go on, because another worker {state}: {names}. Expected: all "
        f"{len(workers.tasks)} workers take part in every step. Received, on {workers.own}: "
        f"{type(error).__name__}: {text.strip().splitlines()[0][:300]}. Look into the log of that "
        "worker, and start all workers again; with keras.callbacks.BackupAndRestore they go on "
        "from the last backup. If a step takes longer, raise the timeout: "
        "tf.distribute.MultiWorkerMirroredStrategy(communication_options="
        "tf.distribute.experimental.CommunicationOptions(timeout_seconds=...))."
    )


def _tells(text: str, task: Task) -> bool:
    tasks = {(job, int(index)) for job, index in _TASK.findall(text)}
    return (task.job, task.index) in tasks or f":{task.address}:" in text


def _answers(task: Task) -> bool:
    try:
        with socket.create_connection((task.host, task.port), _LONGEST_CALL):
            return True
    except OSError:
        return False
