"""Whether a server still runs, and what its silence leads to.

TensorFlow waits without end for a server that is frozen or cut off. A thread for each server calls
it again and again; when it was silent for too long, all connections to it are ended, and whatever
waits for it fails as if the server had been killed, which TensorFlow does notice.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Final

from parallel_keras.workers import sockets
from parallel_keras.workers.cluster import Task

# How each client of HTTP/2, which gRPC is built on, begins; a server answers with a frame of the
# type SETTINGS. Threads of gRPC do that, however busy those of TensorFlow are.
_HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HEAD: Final = 9
_SETTINGS: Final = 4
# A process that was itself stopped for a while finds that it heard nothing in that time. More than
# one call must fail before that counts.
_FEWEST_CALLS: Final = 3
_CALLS_WITHIN_TIMEOUT: Final = 6
_LONGEST_CALL: Final = 10.0
_PAUSE_OF_CUTS: Final = 0.5


def call(address: Task, timeout: float) -> str | None:
    """Calls a server.

    Args:
        address: The `Task`.
        timeout: Float, seconds.

    Returns:
        `None` if it answers, else why not.
    """
    connected = False
    try:
        with socket.create_connection((address.host, address.port), timeout) as connection:
            connected = True
            connection.settimeout(timeout)
            connection.sendall(_HELLO)
            head = connection.recv(_HEAD, socket.MSG_WAITALL)
    except TimeoutError:
        return (
            "it is frozen: the machine accepts calls, but the process does not answer"
            if connected
            else "no answer: the machine is off, cut off, or a firewall drops calls"
        )
    except ConnectionRefusedError:
        return "calls are refused: the machine answers, but no process listens on the port"
    except OSError as error:
        return error.strerror or str(error)
    answers = len(head) == _HEAD and head[3] == _SETTINGS
    return None if answers else "what listens there is no TensorFlow server"


class Pulse(threading.Thread):
    """Calls one server until it is silent for too long.

    Args:
        server: The `Task`.
        port: Int, this script's own, on which the server calls back.
        timeout: Float, the seconds of silence after which connections are ended.

    Attributes:
        failure: String, why the server does not answer; `None` while it does.
    """

    def __init__(self, server: Task, port: int, timeout: float) -> None:
        super().__init__(name=f"pulse of {server}", daemon=True)
        self.server, self.failure = server, None
        self._timeout, self._pause = timeout, timeout / _CALLS_WITHIN_TIMEOUT
        self._hosts = sockets.addresses_of(server.host)
        self._ports = (server.port, port)
        self._over = threading.Event()

    failure: str | None

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()

    def run(self) -> None:
        """Calls, and in the end hangs up."""
        self.failure = self._until_silent()
        while not self._over.is_set():
            # TensorFlow connects anew, and would wait again.
            with contextlib.suppress(OSError):
                sockets.cut(self._hosts, self._ports)
            self._over.wait(_PAUSE_OF_CUTS)

    def _until_silent(self) -> str | None:
        since, failed = 0.0, 0
        while not self._over.is_set():
            start = time.monotonic()
            reason = call(self.server, min(self._pause, _LONGEST_CALL))
            if reason is None:
                failed = 0
                sockets.notice_silence(self._hosts, self._ports, self._timeout)
            else:
                since = since if failed else start
                failed += 1
                if failed >= _FEWEST_CALLS and time.monotonic() - since >= self._timeout:
                    return reason
            self._over.wait(max(0.0, start + self._pause - time.monotonic()))
        return None
