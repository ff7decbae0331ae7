"""Starts a script several times on this machine, each time as another worker.

This is for a first try of a script that is to run on several machines, and for tests. Each worker
gets a TF_CONFIG with the addresses of all, on free ports of this machine (127.0.0.1), and, where
there are GPUs, its share of them. What workers write is marked with their number. When one fails,
the others are stopped, and the exit code is its own. Ctrl-C is passed on. What follows the script
is handed on to it.

TensorFlow's servers have no authentication, and they listen on all network interfaces, whatever
address TF_CONFIG names: run this only where nobody else can reach the ports of this machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from absl import flags

from parallel_keras.commands import CommandError, _processes
from parallel_keras.workers import cluster

_GRACE: Final = flags.DEFINE_float(
    "grace",
    10.0,
    "Seconds that the workers have to end, once they are told to, before they are killed.",
    lower_bound=0.0,
)

HOST: Final = "127.0.0.1"
# Below the ports that systems give to outgoing connections: one of those could otherwise take the
# port of a worker before that has started.
PORTS: Final = range(20000, 30000)


def main(count: str, script: str, *arguments: str) -> int:
    """Runs the workers.

    Args:
        count: How many.
        script: Path of the Python script.
        *arguments: What the script finds in `sys.argv`.

    Returns:
        The exit code: 0, or that of the first worker that failed.
    """
    if not count.isdecimal() or int(count) < 1:
        raise CommandError(
            "Expected the number of workers first, at least 1. "
            f"Received: count={count!r}. For example: python -m parallel_keras workers 2 train.py"
        )
    if not Path(script).is_file():
        raise CommandError(f"Expected the path of a Python script. Received: script={script!r}.")
    if os.name != "posix":
        raise CommandError(
            "Expected a system with process groups, such as Linux or macOS. Received: "
            f"os.name={os.name!r}. Start the workers one by one, each with a TF_CONFIG."
        )
    command = [sys.executable, script, *arguments]
    return _processes.run(command, environments(int(count)), _GRACE.value)


def environments(count: int) -> list[dict[str, str]]:
    """Returns what each worker finds in its environment besides what is there already."""
    addresses = [f"{HOST}:{port}" for port in free_ports(count)]
    found: list[dict[str, str]] = [
        {
            cluster.VARIABLE: cluster.write(addresses, index),
            # Into a pipe, Python writes in large blocks, and everything would come late.
            "PYTHONUNBUFFERED": "1",
        }
        for index in range(count)
    ]
    gpus = _gpus()
    if 0 < len(gpus) < count:
        _processes.say(f"{count} workers and {len(gpus)} GPU(s): all run on the CPU")
    if gpus:
        for index, each in enumerate(found):
            each["CUDA_VISIBLE_DEVICES"] = ",".join(share(gpus, count, index))
    return found


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody listens on, all of them different."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            found.append(port)
    return found


def share(gpus: Sequence[str], count: int, index: int) -> Sequence[str]:
    """Returns the GPUs of one of `count` workers: as many as each can have for itself.

    Example:
    >>> from parallel_keras.commands import workers
    >>> [workers.share(["0", "1", "2", "3", "4"], 2, index) for index in range(2)]
    [['0', '1'], ['2', '3']]
    """
    each = len(gpus) // count
    return gpus[index * each : (index + 1) * each]


def _gpus() -> list[str]:
    """The GPUs that TensorFlow sees, as CUDA_VISIBLE_DEVICES names them."""
    import tensorflow as tf

    count = len(tf.config.list_physical_devices("GPU"))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]
