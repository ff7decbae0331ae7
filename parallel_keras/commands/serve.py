"""Lends the devices of this machine to a script on another one, which calls parallel_keras.connect.

The script names this machine by --address, and the servers of one script exchange tensors with it
and with each other, so --client should name all of them: where the system allows it (Linux), nobody
else is let in, and calls are only taken at --address. The server runs until it is ended, for one
script after the other.

TensorFlow's servers have no authentication and no encryption. --client is no protection against
who can send from an address of those machines, or listen on the way: use a network that only they
can reach.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Final, NoReturn

from absl import flags

from parallel_keras.commands import CommandError
from parallel_keras.workers import sockets
from parallel_keras.workers.cluster import Task, is_address

_ADDRESS: Final = flags.DEFINE_string(
    "address", None, "host:port of this machine, by which the script and other servers reach it."
)
_CLIENT: Final = flags.DEFINE_list(
    "client",
    None,
    "Machines that may call, separated by commas: the script's, and those of the other servers; "
    "each a host, or host:port as given to connect. By default all may.",
)
_ALL_INTERFACES: Final = flags.DEFINE_boolean(
    "all_interfaces",
    False,
    "Take calls at every address of this machine, not at --address only. Needed where others reach "
    "this machine by an address that it does not have itself, or where the system is not Linux.",
)
_TIMEOUT: Final = flags.DEFINE_float(
    "timeout",
    60.0,
    "Seconds after which a connection ends whose other end is no longer there.",
    lower_bound=1.0,
)

# How long a new connection may go without that.
_PAUSE: Final = 2.0


def main() -> NoReturn:
    """Runs the server until it is told to end, and then ends the process."""
    import tensorflow as tf

    from parallel_keras.workers import listening

    own = _own_task()
    hosts = None if _CLIENT.value is None else _hosts(_CLIENT.value)
    listening.give_up_early()
    # The name keeps it alive for as long as it is to serve.
    _server = tf.distribute.Server(
        {listening.JOB: [own.address]}, job_name=listening.JOB, task_index=0
    )
    limits = _limit(own, hosts)
    names = [device.name for device in tf.config.list_physical_devices()]
    devices = ", ".join(name.removeprefix("/physical_device:") for name in names)
    print(f"Security: {listening.SECURITY % own.address}", flush=True)
    print(f"Serving {devices} on {own.address} {limits}. Ctrl-C ends it.", flush=True)
    run_until_ended()


def _own_task() -> Task:
    address = _ADDRESS.value
    if address is None or not is_address(address):
        raise CommandError(
            "Expected --address=host:port, by which the other machines reach this one. "
            f"Received: address={address!r}. For example: --address=10.0.0.1:2222"
        )
    from parallel_keras.workers import listening  # starts TensorFlow

    own = Task(listening.JOB, 0, address)
    try:
        found = sockets.addresses_of(own.host)
        if any(each.is_unspecified for each in found):
            raise CommandError(
                f"Expected one address of this machine. Received: address={address!r}, which "
                "stands for all of them, so nobody can call it. Name the one that the others "
                "use; --all_interfaces takes calls at all of them."
            )
        listening.check_own_address(_anywhere(own) if _ALL_INTERFACES.value else own)
    except OSError as error:
        raise CommandError(error.strerror or error) from error
    return own


def _anywhere(own: Task) -> Task:
    return Task(own.job, own.index, f"0.0.0.0:{own.port}")


def _hosts(clients: list[str]) -> list[str]:
    return [_host(Task("", 0, each).host if is_address(each) else each) for each in clients]


def _host(client: str) -> str:
    try:
        sockets.addresses_of(client.strip("[]"))
    except OSError as error:
        raise CommandError(
            "Expected --client to be hosts or addresses of other machines, separated by commas: "
            f"{error.strerror or error}. Received: client={client!r}."
        ) from error
    return client.strip("[]")


def _limit(own: Task, hosts: list[str] | None) -> str:
    """Closes the server to who is not meant; says in words whom it serves."""
    from parallel_keras.workers import listening

    if _ALL_INTERFACES.value and hosts is None:
        return "at all addresses of this machine, to everyone"
    if not listening.let_in(own, hosts, everywhere=_ALL_INTERFACES.value):
        if not _ALL_INTERFACES.value:
            raise CommandError(
                "TensorFlow listens on all network interfaces, and this system offers no way to "
                "limit that. Expected: Linux, or the consent to that. Received: "
                "all_interfaces=False. Put a firewall before the port, and give --all_interfaces."
            )
        return "at all addresses of this machine, to everyone: this system cannot limit that"
    where = "at all addresses of this machine, " if _ALL_INTERFACES.value else ""
    return where + ("to everyone" if hosts is None else f"to {', '.join(hosts)}")


def run_until_ended() -> NoReturn:
    """Serves until SIGINT (Ctrl-C) or SIGTERM, and then ends the process."""

    def end(*_: Any) -> None:
        # TensorFlow has no clean end of a server: it took over 20 s once a script had failed. And
        # another signal may come while this runs, so that nothing here may wait for a lock.
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while True:
        time.sleep(_PAUSE)
        sockets.notice_any_silence(_TIMEOUT.value)
