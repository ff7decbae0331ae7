"""One script that uses the devices of other machines: `connect` here, `serve` there."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Final

import grpc
import tensorflow as tf
from absl import logging

from parallel_keras.workers import heartbeat, sockets
from parallel_keras.workers.cluster import Task, is_address

# Servers exchange what TensorFlow calls by its own version, so each says which that is.
SERVES: Final = "served_by_tensorflow_"
JOB: Final = SERVES + re.sub(r"\W", "_", tf.__version__)
SECURITY: Final = (
    "TensorFlow's servers have no authentication and no encryption: whoever reaches %s can read "
    "and change data and weights, and run code as this user. Use a network that only these "
    "machines can reach. See docs/multi-machine.md, Security."
)
# What TensorFlow's jobs are called in device names, the servers' and the script's.
_WORKER: Final = "worker"
_SCRIPT: Final = "localhost"
_PAUSE: Final = 0.2
_LONGEST_CALL: Final = 5.0
# gRPC waits 20 s for a connection before it says that there is none.
_OPTIONS: Final = "TF_GRPC_DEFAULT_OPTIONS"
_RECONNECT: Final = "grpc.min_reconnect_backoff_ms=2000"
_OF_THE_CONNECTION: Final = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
)
_NAMES: Final = re.compile(rb"/job:(\w+)/replica:0/task:(\d+)/device:")


class Servers:
    """The servers that this script is connected to.

    Args:
        tasks: Sequence of `Task`, one for each server.
        own: `Task`, the address of this script.
        timeout: Float, seconds.
    """

    def __init__(self, tasks: Sequence[Task], own: Task, timeout: float) -> None:
        self.tasks, self.own, self.timeout = tasks, own, timeout
        self._found = [_status(task) for task in tasks]
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
            if reason is None and _status(task) not in (before, b""):
                reason = "it was started anew, and what it held for this script is lost"
            if reason is not None:
                found[task] = reason
        return found

    def error(self, failures: dict[Task, str], cause: Exception | None) -> ConnectionError:
        """What to raise when servers are gone."""
        names = "; ".join(f"{task}: {reason}" for task, reason in failures.items())
        first = str(cause).strip().splitlines()[0][:300] if str(cause).strip() else ""
        received = f"{type(cause).__name__}: {first}" if cause else "an earlier failure"
        return ConnectionError(
            f"This script cannot go on, because a server is gone: {names}. Expected: all "
            f"{len(self.tasks)} servers answer within {self.timeout:g} s. Received: {received}. "
            "Start the server again (python -m parallel_keras serve), and then this script: what "
            "was on the server is lost, and to connect once more in the same process does not "
            "help. With keras.callbacks.BackupAndRestore, fit goes on from the last backup. If a "
            "server may be silent for longer, raise the timeout: pk.connect(..., timeout=...)."
        )


_connected: Servers | None = None


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
    global _connected  # TensorFlow has one cluster for each process.
    tasks = _tasks(addresses, timeout)
    own = Task(_SCRIPT, 0, own_address or _own_address(tasks[0]))
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
    check_own(own)
    _wait_for(tasks, timeout)
    for task in tasks:
        _check_server(task)
    give_up_early()
    logging.warning(SECURITY, f"{own.address} and {', '.join(addresses)}")
    _connected = Servers(tasks, own, timeout)
    with _connected_or_stopped(_connected):
        jobs = {_WORKER: list(addresses), _SCRIPT: [own.address]}
        tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(jobs))
        every = [device.name for device in tf.config.list_logical_devices()]  # It connects.
        let_in(own, sorted({own.host, *(task.host for task in tasks)}))
        _check_paths(tasks)
    return [name for name in every if name.startswith(f"/job:{_WORKER}/")]


@contextlib.contextmanager
def naming_faults() -> Iterator[None]:
    """Turns TensorFlow's errors into one that names the server that is gone, if one is.

    Changes nothing where `connect` was not called.

    Raises:
        ConnectionError: If a server is gone.
    """
    servers = _connected
    if servers is None:
        yield
        return
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
    global _connected  # See `connect`.
    try:
        with naming_faults():
            yield
    except BaseException:
        servers.stop()
        _connected = None
        raise


def _tasks(addresses: Sequence[str], timeout: float) -> list[Task]:
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


def _own_address(server: Task) -> str:
    """The address that this machine has on the way to a server, with a free port."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as way:
            way.connect(place)  # Sends nothing.
            host = way.getsockname()[0]
        with socket.create_server((host, 0), family=family) as listening:
            port = listening.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"This machine has no way to {server}: {error.strerror or error}. Expected: an address "
            "that it can reach. Received: own_address=None, so it was to be found. Correct the "
            "address of the server, or give own_address."
        ) from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _has_started() -> bool:
    """Whether TensorFlow has started its runtime, for which it has no public question."""
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    try:
        tf.config.threading.set_inter_op_parallelism_threads(threads + 1)
    except RuntimeError:
        return True
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return False


def give_up_early() -> None:
    """Has gRPC say within seconds that there is no connection, before TensorFlow starts it."""
    os.environ.setdefault(_OPTIONS, _RECONNECT)


def check_own(own: Task) -> None:
    """Tries to listen on an address before TensorFlow does, which ends the process instead.

    Args:
        own: The `Task`.

    Raises:
        OSError: If that is not possible.
    """
    family = socket.AF_INET6 if ":" in own.host else socket.AF_INET
    try:
        socket.create_server((own.host, own.port), family=family).close()
    except OSError as error:
        raise OSError(
            f"This process cannot listen on {own.address}: {error.strerror or error}. Expected: an "
            "address of this machine, with a port that no other process uses. Received: "
            f"address={own.address}. `ip address` shows the addresses, `ss -tlnp` the ports taken."
        ) from error


def let_in(own: Task, hosts: Sequence[str] | None, *, everywhere: bool = False) -> bool:
    """Has this process' server take calls at its own address only, and of some hosts only.

    Args:
        own: The `Task` of this process.
        hosts: Names or addresses of those that may call, or `None` for all.
        everywhere: Bool, whether calls at its other addresses are taken too.

    Returns:
        Whether the system allowed it.
    """
    callers = None if hosts is None else set().union(*map(sockets.addresses_of, hosts))
    at = None if everywhere else sockets.addresses_of(own.host)
    return sockets.listens_to(own.port, at, callers)


def _wait_for(tasks: Sequence[Task], timeout: float) -> None:
    """Returns when all servers answer: they may start later than this script."""
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


def _status(task: Task) -> bytes:
    """What a server says of itself: its devices, with numbers that are new with each start."""
    with grpc.insecure_channel(task.address) as channel:
        ask = channel.unary_unary("/tensorflow.WorkerService/GetStatus")
        try:
            return bytes(ask(b"", timeout=_LONGEST_CALL))
        except grpc.RpcError:
            return b""


def _check_server(task: Task) -> None:
    """Refuses what is a server, but not one for this script."""
    names = {(job.decode(), int(index)) for job, index in _NAMES.findall(_status(task))}
    if names <= {(JOB, 0), (task.job, task.index)} and names:
        return
    found = ", ".join(f"/job:{job}/task:{index}" for job, index in sorted(names))
    versions = [job.removeprefix(SERVES) for job, _ in names if job.startswith(SERVES)]
    if versions:
        found = f"a server of TensorFlow {versions[0].replace('_', '.')}"
    raise ValueError(
        f"Something else than a server for this script runs at {task.address}. Expected: python -m "
        f"parallel_keras serve with TensorFlow {tf.__version__}, or a tf.distribute.Server of "
        f"/job:{task.job}/task:{task.index}. Received: {found or 'no TensorFlow server'}, which "
        "may belong to another cluster. Correct the address, or start the server there."
    )


def _check_paths(tasks: Sequence[Task]) -> None:
    """Has every server fetch a number from this script and from all others."""

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
        own = None if _connected is None else _connected.own.address
        raise ConnectionError(
            "The servers cannot fetch tensors from this script or from each other. Expected: every "
            f"server reaches {own}, and the addresses of the other servers. Received: "
            f"{type(error).__name__}: {str(error).strip()[:500]}. Give an own_address that the "
            "servers can reach, let every machine in with --client, and let the ports through the "
            "firewalls."
        ) from error
