"""The TCP sockets that TensorFlow has opened in this process.

TensorFlow listens on every interface, waits without end for what does not answer, and offers no
option for either. The operating system does: whatever code opened a socket, the process may set
its options and end its connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

_FILES: Final = "/dev/fd"
_PROBES: Final = 3

# Berkeley packet filter, see linux/filter.h: what is loaded counts from the network header.
_ATTACH_FILTER: Final = 26
_NETWORK: Final = 0xFFF00000
_LOAD, _LOAD_BYTE, _SHIFT_RIGHT, _EQUAL, _JUMP, _RETURN = 0x20, 0x30, 0x74, 0x15, 0x05, 0x06
_ACCEPT, _DROP = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)
# Version of IP: (where the sender's address is, where the receiver's is).
_PLACES: Final = {4: (12, 16), 6: (8, 24)}

_Instruction = tuple[int, int, int, int]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def addresses_of(host: str) -> set[Address]:
    """Returns the IP addresses of a host.

    Args:
        host: String, a name or an IP address.

    Raises:
        OSError: If there is no such host.

    Example:
    >>> from parallel_keras.workers import sockets
    >>> sockets.addresses_of("127.0.0.1")
    {IPv4Address('127.0.0.1')}
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {_plain(str(entry[4][0])) for entry in found}


def _plain(host: str) -> Address:
    """An address; that of IPv4 where it stands within one of IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _each() -> Iterator[socket.socket]:
    """Every TCP socket of this process, by a handle of our own that is closed afterwards."""
    try:
        names = [path.name for path in Path(_FILES).iterdir()]
    except OSError:  # Not every system shows them.
        return
    for name in names:
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # Closed meanwhile.
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == (
                socket.SOCK_STREAM
            ):
                yield found


def _is_between(found: socket.socket, hosts: Collection[Address], ports: Collection[int]) -> bool:
    """Whether a socket is connected to one of the hosts, with one of the ports at either end."""
    try:
        here, there = found.getsockname(), found.getpeername()
    except OSError:  # Not connected.
        return False
    return _plain(there[0]) in hosts and not {here[1], there[1]}.isdisjoint(ports)


def notice_silence(hosts: Collection[Address], ports: Collection[int], seconds: float) -> None:
    """Has the operating system end connections whose other end is no longer there.

    Args:
        hosts: The addresses at the other end.
        ports: Connections that have none of these ports at either end are left alone.
        seconds: Float, after how long.
    """
    for found in _each():
        if _is_between(found, hosts, ports):
            _keep_alive(found, seconds)


def notice_any_silence(seconds: float) -> None:
    """Does the same for all connections of this process."""
    for found in _each():
        _keep_alive(found, seconds)


def _keep_alive(found: socket.socket, seconds: float) -> None:
    pause = max(1, round(seconds / (_PROBES + 1)))
    options = {"TCP_KEEPIDLE": pause, "TCP_KEEPINTVL": pause, "TCP_KEEPCNT": _PROBES}
    # What was sent and is not acknowledged is older than any probe.
    options["TCP_USER_TIMEOUT"] = round(1000 * seconds)
    with contextlib.suppress(OSError):  # Closed meanwhile.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def cut(hosts: Collection[Address], ports: Collection[int]) -> int:
    """Ends connections at once, as if the other end were gone.

    Args:
        hosts: The addresses at the other end.
        ports: Connections that have none of these ports at either end are left alone.

    Returns:
        How many there were.
    """
    count = 0
    for found in _each():
        if _is_between(found, hosts, ports):
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def listens_to(
    port: int, local: Collection[Address] | None, hosts: Collection[Address] | None
) -> bool:
    """Has a port of this process take calls of some hosts only, and at some addresses only.

    This is no authentication: a host may lie about its address, and everyone on a host that may
    call may call.

    Args:
        port: Int, on which the process listens.
        local: Addresses of this machine at which it takes calls, or `None` for all.
        hosts: Addresses from which it takes calls, or `None` for any.

    Returns:
        Whether it worked; it needs Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    program = _filter(local, hosts)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    handle = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    done = False
    for found in _each():
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and (
            found.getsockname()[1] == port
        ):
            found.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, handle)
            done = True
    return done


def _filter(
    local: Collection[Address] | None, hosts: Collection[Address] | None
) -> list[_Instruction]:
    """Accepts packets to one of `local` from one of `hosts`. Jumps are relative, and forward."""
    program: list[_Instruction] = []
    for version, (sender, receiver) in _PLACES.items():
        part: list[_Instruction] = []
        for addresses, place in ((local, receiver), (hosts, sender)):
            if addresses is not None:
                part += _unless_one_of([a for a in addresses if a.version == version], place)
        part.append(_ACCEPT)
        program += [(_LOAD_BYTE, 0, 0, _NETWORK), (_SHIFT_RIGHT, 0, 0, 4)]
        program += [(_EQUAL, 1, 0, version), (_JUMP, 0, 0, len(part)), *part]
    return [*program, _DROP]


def _unless_one_of(addresses: Collection[Address], place: int) -> list[_Instruction]:
    """Drops a packet, unless the address at this place is one of these."""
    checks: list[list[_Instruction]] = []
    for address in addresses:
        words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
        check: list[_Instruction] = []
        for index, word in enumerate(words):
            # Where a word differs, go on behind the jump that ends this check.
            skip = 2 * (len(words) - index) - 1
            check += [(_LOAD, 0, 0, _NETWORK + place + 4 * index), (_EQUAL, 0, skip, word)]
        checks.append(check)
    program: list[_Instruction] = [_DROP]
    for check in reversed(checks):
        program = [*check, (_JUMP, 0, 0, len(program)), *program]
    return program
