"""One script that uses the devices of other machines: `connect` here, `serve` there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import tensorflow as tf
from absl import logging

from parallel_keras.workers import heartbeat, listening, server_checks
from parallel_keras.workers.cluster import Task, is_address

# What TensorFlow's jobs are called in device names, the servers' and the script's.
_WORKER: Final = "worker"
_SCRIPT: Final = "localhost"
_LONGEST_CALL: Final = 5.0
# The innermost comes first: whom another server waited for.
_TARGET: Final = re.compile(rf"remote target /job:{_WORKER}/replica:0/task:(\d+)\b")
_OF_THE_CONNECTION: Final = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
)


class Servers:
    """The servers that this script is connected to.

    Args:
        tasks: Sequence of `Task`, one for each server.
        own: `Task`, the address of this script.
        timeout: Float, seconds.
    """

    def __init__(self, tasks: Sequence[Task], own: Task, timeout: float) -> None:
        self.tasks, self.own, self.timeout = tasks, own, timeout
        self._found = [server_checks.status(task) for task in tasks]
        # Half of the time is for TensorFlow, to give up what it does on the others.
        self._pulses = [heartbeat.Pulse(task, own.port, timeout / 2) for task in tasks]
        for pulse in self._pulses:
            pulse.start()

    def stop(self) -> None:
        """Ends the threads that call the servers."""
        for pulse in self._pulses:
            pulse.stop()

    def failures(self, error: Exception | None = None) -> dict[Task, str]:
        """The servers that are gone, with the reasons.

        Args:
            error: What TensorFlow raised; then each server is called once more.
        """
        found = {pulse.server: pulse.failure for pulse in self._pulses if pulse.failure}
        if error is None or found:
            return found
        for task, before in zip(self.tasks, self._found, strict=True):
            reason = heartbeat.call(task, _LONGEST_CALL)
            if reason is None and server_checks.status(task) not in (before, b""):
                reason = "it was started anew, and what it held for this script is lost"
            if reason is not None:
                found[task] = reason
        lost = _TARGET.search(str(error))
        if lost and not found and isinstance(error, tf.errors.UnavailableError):
            reason = "it answers now, but its connection to this script or another server broke"
            found = {task: reason for task in self.tasks if task.index == int(lost[1])}
        return found

    def error(self, failures: dict[Task, str], cause: Exception | None) -> ConnectionError:
        """What to raise when servers are gone."""
        names = "; ".join(f"{task}: {reason}" for task, reason in failures.items())
        said = " ".join(str(cause).split())[:300]
        received = f"{type(cause).__name__}: {said}" if cause else "an earlier failure"
        return ConnectionError(
            f"This script cannot go on, because a server is gone: {names}. Expected: all "
            f"{len(self.tasks)} servers answer within {self.timeout:g} s. Received: {received}. "
            "Start the server again (python -m parallel_keras serve), and then this script: what "
            "was on the server is lost, and to connect once more in the same process does not "
            "help. With keras.callbacks.BackupAndRestore, fit goes on from the last backup. If a "
            "server may be silent for longer, raise the timeout: pk.connect(..., timeout=...)."
        )


# At most one: TensorFlow has one cluster for each process.
_connected: list[Servers] = []


def connect(
    addresses: Sequence[str], own_address: str | None = None, *, timeout: float = 60.0
) -> list[str]:
    """Makes the devices of other machines usable in this script.

    On each of them `python -m parallel_keras serve --address=host:port` must run. It
    must be called once, before TensorFlow starts: before the first tensor, variable or
    model is made. The servers fetch tensors from this script, so they must be able to
    reach `own_address`, and each other.

    TensorFlow's servers have no authentication and no encryption, and this script becomes
    one too. Where the system allows it (Linux), only the servers may call it.

    Args:
        addresses: Sequence of strings `"host:port"`, one for each server.
        own_address: String `"host:port"`, by which the servers reach this script, of an
            address of this machine. Defaults to the address from which this machine
            reaches the first server, with a free port.
        timeout: Float, the seconds to wait for the servers, and later the seconds after
            which a server that does not answer is an error. Defaults to 60.

    Returns:
        The names of the servers' devices, such as
        `"/job:worker/replica:0/task:0/device:GPU:0"`, in the order of `addresses`.

    Raises:
        ValueError: If an address is malformed or given twice, if TensorFlow has started
            already, or if something else than a fitting server answers.
        OSError: If this process cannot listen on `own_address`.
        TimeoutError: If a server does not answer in time; names each, with the reason.
        ConnectionError: If servers cannot reach this script or each other.

    Example:
    ```python
    import parallel_keras as pk

    devices = pk.connect(["10.0.0.1:2222", "10.0.0.2:2222"], own_address="10.0.0.9:2223")
    parallel = pk.DataParallelModel(model, devices)
    ```
    """
    tasks = _tasks(addresses, timeout)
    own = Task(_SCRIPT, 0, own_address or listening.own_address(tasks[0]))
    if not is_address(own.address):
        raise ValueError(
            'Expected `own_address` to be a string "host:port", by which the servers reach this '
            f"script. Received: own_address={own_address!r}."
        )
    if _has_started():
        raise ValueError(
            "connect must run once, before TensorFlow starts its runtime, and it has already "
            "started (something made a tensor, a variable or a model, listed the logical devices, "
            f"or connected). Received: addresses={list(addresses)}. Move the call to the top of "
            "the script, right after the imports (and after virtual_devices)."
        )
    listening.check_own_address(own)
    server_checks.wait_for(tasks, timeout)
    for task in tasks:
        server_checks.check_server(task)
    listening.give_up_early()
    logging.warning(listening.SECURITY, f"{own.address} and {', '.join(addresses)}")
    with _connected_or_stopped(Servers(tasks, own, timeout)):
        jobs = {_WORKER: list(addresses), _SCRIPT: [own.address]}
        tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(jobs))
        every = [device.name for device in tf.config.list_logical_devices()]  # It connects.
        listening.let_in(own, sorted({own.host, *(task.host for task in tasks)}))
        server_checks.check_paths(tasks, own)
    return [name for name in every if name.startswith(f"/job:{_WORKER}/")]


@contextlib.contextmanager
def naming_faults() -> Iterator[None]:
    """Turns TensorFlow's errors into one that names the server that is gone, if one is.

    Changes nothing where `connect` was not called.

    Raises:
        ConnectionError: If a server is gone.
    """
    if not _connected:
        yield
        return
    servers = _connected[0]
    gone = servers.failures()
    if gone:
        raise servers.error(gone, None)
    try:
        yield
    except _OF_THE_CONNECTION as error:
        gone = servers.failures(error)
        if not gone:
            raise
        raise servers.error(gone, error) from error


@contextlib.contextmanager
def _connected_or_stopped(servers: Servers) -> Iterator[None]:
    _connected.append(servers)
    try:
        with naming_faults():
            yield
    except BaseException:
        servers.stop()
        _connected.clear()
        raise


def _tasks(addresses: Sequence[str], timeout: Any) -> list[Task]:
    if isinstance(addresses, str) or not addresses or not all(map(is_address, addresses)):
        raise ValueError(
            'Expected `addresses` to be a list of strings "host:port", one for each server. '
            f'Received: addresses={addresses!r}. Write for example ["10.0.0.1:2222"].'
        )
    if len(set(addresses)) < len(addresses):
        raise ValueError(
            f"Expected every server once. Received: addresses={list(addresses)}. A server gives "
            "all devices of its machine."
        )
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(
            f"Expected `timeout` to be a number of seconds above 0. Received: timeout={timeout!r}."
        )
    return [Task(_WORKER, index, address) for index, address in enumerate(addresses)]


def _has_started() -> bool:
    """Whether TensorFlow has started its runtime, for which it has no public question."""
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    try:
        tf.config.threading.set_inter_op_parallelism_threads(threads + 1)
    except RuntimeError:
        return True
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return False
