"""What a process does that becomes a server of TensorFlow's: be found, and be reached by few."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from typing import Final

import tensorflow as tf

from parallel_keras.workers import sockets
from parallel_keras.workers.cluster import Task

# Servers exchange what TensorFlow calls by its own version, so each says which that is.
SERVES: Final = "served_by_tensorflow_"
JOB: Final = SERVES + re.sub(r"\W", "_", tf.__version__)
SECURITY: Final = (
    "TensorFlow's servers have no authentication and no encryption: whoever reaches %s can read "
    "and change data and weights, and run code as this user. Use a network that only these "
    "machines can reach. See docs/multi-machine.md, Security."
)
# gRPC waits 20 s for a connection before it says that there is none.
_OPTIONS: Final = "TF_GRPC_DEFAULT_OPTIONS"
_RECONNECT: Final = "grpc.min_reconnect_backoff_ms=2000"


def own_address(server: Task) -> str:
    """The address that this machine has on the way to a server, with a free port.

    Args:
        server: The `Task`.

    Returns:
        String `"host:port"`.

    Raises:
        OSError: If there is no way to it.
    """
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


def give_up_early() -> None:
    """Has gRPC say within seconds that there is no connection, before TensorFlow starts it."""
    os.environ.setdefault(_OPTIONS, _RECONNECT)


def check_own_address(own: Task) -> None:
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
