"""Every worker calls every other one before training starts, and names who does not answer."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import socketserver
import threading
import time
from typing import Any, Final

from parallel_keras.workers import cluster
from parallel_keras.workers.cluster import Cluster, Task

_LONGEST_CALL: Final = 2.0
_PAUSE: Final = 0.1
_LONGEST_HELLO: Final = 1 << 16


def check_workers(timeout: float = 60.0) -> Cluster:
    """Checks TF_CONFIG, and that the workers it names can reach each other.

    `tf.distribute.MultiWorkerMirroredStrategy()` waits for minutes, or for
    ever, when an address in TF_CONFIG is wrong or a worker has not started, and
    does not say which. Call this on every worker before the strategy is made.
    It opens the port of this worker's own address for as long as it runs, and
    closes it again for TensorFlow.

    Args:
        timeout: Float, seconds to wait for the other workers. Defaults to 60.

    Returns:
        The `Cluster` that TF_CONFIG describes.

    Raises:
        ValueError: If TF_CONFIG is malformed, or another worker has another one.
        OSError: If this process cannot listen on its own address.
        TimeoutError: If a worker does not answer in time; names each one with
            its address and what happened there.

    Example:
    ```python
    from parallel_keras.workers.roll_call import check_workers

    check_workers(timeout=60)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    ```

    Source: https://github.com/tensorflow/tensorflow/issues/39922.
    """
    found = cluster.read(os.environ.get(cluster.VARIABLE))
    call_roll(found, timeout)
    return found


def call_roll(workers: Cluster, timeout: float) -> None:
    """Returns when the worker has reached, and was reached by, every other one.

    Args:
        workers: `Cluster`, as `cluster.read` gives it.
        timeout: Float, seconds to wait for the other workers.

    Raises:
        ValueError: If another worker has another cluster.
        OSError: If this process cannot listen on its own address.
        TimeoutError: If a worker does not answer in time.
    """
    call = _RollCall(workers)
    with _listen(call) as server:
        thread = threading.Thread(target=server.serve_forever, args=[_PAUSE], daemon=True)
        thread.start()
        try:
            call.until_complete(time.monotonic() + timeout)
        finally:
            server.shutdown()
            thread.join()
    call.check(timeout)


@dataclasses.dataclass
class _RollCall:
    """What is known of the others so far."""

    workers: Cluster

    def __post_init__(self) -> None:
        self.reached: set[Task] = set()
        self.heard: set[Task] = set()
        self.failures: dict[Task, str] = {}
        self.conflict: tuple[str, Any] | None = None
        self.names = [str(task) for task in self.workers.tasks]

    @property
    def complete(self) -> bool:
        """Whether everybody reached everybody as far as this worker is concerned."""
        others = set(self.workers.others)
        return others == self.reached and others == self.heard

    def until_complete(self, deadline: float) -> None:
        """Calls whoever was not reached yet, again and again."""
        while not self.complete and self.conflict is None and time.monotonic() < deadline:
            for task in self.workers.others:
                left = deadline - time.monotonic()
                if task not in self.reached and left > 0:
                    self._call(task, min(_LONGEST_CALL, left))
            time.sleep(_PAUSE)

    def _call(self, task: Task, timeout: float) -> None:
        try:
            with socket.create_connection((task.host, task.port), timeout) as connection:
                found = self._greet(connection)
        except OSError as error:
            self.failures[task] = error.strerror or str(error)
            return
        if found == task:
            self.reached.add(task)
        else:
            self.failures[task] = f"{found or 'something else'} answers at this address"

    def answer(self, connection: socket.socket) -> None:
        """Takes the call of another worker."""
        try:
            found = self._greet(connection)
        except OSError:
            return  # Who hangs up calls again.
        if found is not None:
            self.heard.add(found)

    def _greet(self, connection: socket.socket) -> Task | None:
        """Says who this worker is; returns who the other one is, if it is one of the cluster."""
        connection.settimeout(_LONGEST_CALL)
        hello = {"rank": self.workers.rank, "workers": self.names}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        with connection.makefile("rb") as stream:
            line = stream.readline(_LONGEST_HELLO)
        try:
            other = json.loads(line)
            rank, names = other["rank"], other["workers"]
        except (ValueError, TypeError, KeyError):
            return None  # Anyone may call, and in any language.
        if names != self.names:
            self.conflict = (f"rank {rank}", names)
            return None
        known = isinstance(rank, int) and 0 <= rank < len(names)
        return self.workers.tasks[rank] if known else None

    def check(self, timeout: float) -> None:
        """Raises an error if another worker has another cluster, or if someone is missing."""
        own = self.workers.own
        if self.conflict is not None:
            raise ValueError(
                f"The workers do not have the same cluster in {cluster.VARIABLE}. Expected, as on "
                f"{own}: {self.names}. Received, on the worker of {self.conflict[0]}: "
                f"{self.conflict[1]}. Start all workers with the same addresses in the same order."
            )
        failures = []
        for task in self.workers.others:
            if task not in self.reached:
                failures.append(f"{task}: {self.failures.get(task, 'not called yet')}")
            elif task not in self.heard:
                failures.append(f"{task}: it answers, but has not reached {own}")
        if failures:
            raise TimeoutError(
                f"Not all workers found each other within {timeout:g} s. Expected: every worker of "
                f"{cluster.VARIABLE} runs this check at the same time, and can reach the others. "
                f"Received: {'; '.join(failures)}. Start the missing workers, correct their "
                "addresses, or let their ports through the firewall."
            )


def _listen(call: _RollCall) -> socketserver.ThreadingTCPServer:
    own = call.workers.own

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            call.answer(self.request)

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in own.host else socket.AF_INET
        # TensorFlow takes the same port right afterwards.
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = len(call.names)

    try:
        return Server((own.host, own.port), Handler)
    except OSError as error:
        raise OSError(
            f"This worker cannot listen on its own address: {error.strerror or error}. Expected: "
            "an address of this machine, with a port that no other process uses. Received: "
            f"{own}. Check the 'index' in {cluster.VARIABLE}: every worker has another one."
        ) from error
