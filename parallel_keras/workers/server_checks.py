"""Whether servers are there, are the right ones, and reach whom they must."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Final

import grpc
import tensorflow as tf

from parallel_keras.workers import heartbeat, listening
from parallel_keras.workers.cluster import Task

_PAUSE: Final = 0.2
_LONGEST_CALL: Final = 5.0
_NAMES: Final = re.compile(rb"/job:(\w+)/replica:0/task:(\d+)/device:")


def wait_for(tasks: Sequence[Task], timeout: float) -> None:
    """Returns when all servers answer: they may start later than this script.

    Args:
        tasks: Sequence of `Task`, one for each server.
        timeout: Float, seconds.

    Raises:
        TimeoutError: If some do not answer in time; names each, with the reason.
    """
    end = time.monotonic() + timeout
    silent = dict.fromkeys(tasks, "not called yet")
    while True:
        for task in list(silent):
            reason = heartbeat.call(task, max(0.1, min(_LONGEST_CALL, end - time.monotonic())))
            if reason is None:
                del silent[task]
            else:
                silent[task] = reason
        if not silent:
            return
        if time.monotonic() >= end:
            break
        time.sleep(_PAUSE)
    raise TimeoutError(
        f"Not all servers answered within {timeout:g} s. Expected: on each machine runs python -m "
        "parallel_keras serve --address=host:port, and its port can be reached from here. "
        f"Received: {'; '.join(f'{task}: {reason}' for task, reason in silent.items())}. Start the "
        "missing servers, correct their addresses, let this machine in with --client, or let the "
        "ports through the firewall."
    )


def status(task: Task) -> bytes:
    """What a server says of itself: its devices, with numbers that are new with each start.

    Args:
        task: The `Task`.

    Returns:
        Bytes; none if it does not answer.
    """
    with grpc.insecure_channel(task.address) as channel:
        ask = channel.unary_unary("/tensorflow.WorkerService/GetStatus")
        try:
            return bytes(ask(b"", timeout=_LONGEST_CALL))
        except grpc.RpcError:
            return b""


def check_server(task: Task) -> None:
    """Refuses what is a server, but not one for this script.

    Args:
        task: The `Task`.

    Raises:
        ValueError: If something else says that it is there.
    """
    names = {(job.decode(), int(index)) for job, index in _NAMES.findall(status(task))}
    if names <= {(listening.JOB, 0), (task.job, task.index)} and names:
        return
    found = ", ".join(f"/job:{job}/task:{index}" for job, index in sorted(names))
    versions = [
        job.removeprefix(listening.SERVES) for job, _ in names if job.startswith(listening.SERVES)
    ]
    if versions:
        found = f"a server of TensorFlow {versions[0].replace('_', '.')}"
    raise ValueError(
        f"Something else than a server for this script runs at {task.address}. Expected: python -m "
        f"parallel_keras serve with TensorFlow {tf.__version__}, or a tf.distribute.Server of "
        f"/job:{task.job}/task:{task.index}. Received: {found or 'no TensorFlow server'}, which "
        "may belong to another cluster. Correct the address, or start the server there."
    )


def check_paths(tasks: Sequence[Task], own: Task) -> None:
    """Has every server fetch a number from this script and from all others.

    Args:
        tasks: Sequence of `Task`, one for each server.
        own: The `Task` of this script.

    Raises:
        ConnectionError: If one cannot.
    """

    @tf.function(autograph=False)
    def fetch(number: tf.Tensor) -> list[tf.Tensor]:
        told = [number]
        for task in tasks:
            with tf.device(f"/job:{task.job}/task:{task.index}/device:CPU:0"):
                told.append(number + 1.0)
        sums = []
        for task in tasks:
            with tf.device(f"/job:{task.job}/task:{task.index}/device:CPU:0"):
                sums.append(tf.add_n(told))
        return sums

    try:
        fetch(tf.constant(1.0))
    except tf.errors.OpError as error:
        said = " ".join(str(error).split())[:500]
        raise ConnectionError(
            "The servers cannot fetch tensors from this script or from each other. Expected: every "
            f"server reaches {own.address}, and the addresses of the other servers. Received: "
            f"{type(error).__name__}: {said}. Give an own_address that the "
            "servers can reach, let every machine in with --client, and let the ports through the "
            "firewalls."
        ) from error
