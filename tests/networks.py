"""Several hosts on one machine: network namespaces, each with a cable to one bridge.

What runs in a namespace has an address, routes and ports of its own, and no loopback in common
with the others, so it meets what processes on other machines meet. The bridge has a namespace too:
nothing of this machine's own network is touched. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator

_COUNTER = itertools.count()


class NoNetworksError(Exception):
    """This machine allows no network namespaces; the text says why."""


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Host:
    """One namespace.

    Args:
        name: Of the namespace.
        ip: Its address.
        hub: The namespace of the bridge, where the other end of the cable is.
    """

    name: str
    ip: str
    hub: str

    @property
    def prefix(self) -> list[str]:
        """What a command begins with to run there."""
        return ["ip", "netns", "exec", self.name]

    def address(self, port: int) -> str:
        return f"{self.ip}:{port}"

    def cut(self) -> None:
        """Pulls the cable out of the bridge: nobody here is told, packets vanish."""
        _run("ip", "-n", self.hub, "link", "set", self.name, "nomaster")

    def plug_in(self) -> None:
        _run("ip", "-n", self.hub, "link", "set", self.name, "master", "bridge")

    def slow(self, rate: str, wait: str = "400ms") -> None:
        """Gives both directions of the cable a speed, such as `"100mbit"`."""
        for namespace, link in ((self.name, "eth0"), (self.hub, self.name)):
            shape = ["root", "tbf", "rate", rate, "burst", "512kb", "latency", wait]
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", link, *shape)

    def counted(self) -> tuple[int, int]:
        """The bytes that the kernel has sent and received over the cable."""
        (link,) = json.loads(_run("ip", "-n", self.name, "-s", "-j", "link", "show", "eth0"))
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Makes hosts that reach each other and nobody else, and deletes them in any case.

    Raises:
        NoNetworksError: If that cannot be done on this machine.
    """
    if not shutil.which("ip") or not shutil.which("tc"):
        raise NoNetworksError("Network namespaces need iproute2 (`ip` and `tc`).")
    if os.geteuid() != 0:
        raise NoNetworksError("Network namespaces need root.")
    stem = f"pk{os.getpid()}n{next(_COUNTER)}"
    hub = f"{stem}b"
    made: list[str] = []
    try:
        try:
            _run("ip", "netns", "add", hub)
            made.append(hub)
            _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", hub, "link", "set", "bridge", "up")
            found = [Host(f"{stem}h{i}", f"10.213.7.{i + 1}", hub) for i in range(count)]
            for host in found:
                _run("ip", "netns", "add", host.name)
                made.append(host.name)
                _join(host)
        except subprocess.CalledProcessError as error:
            raise NoNetworksError(f"No network namespaces here: {error.stderr.strip()}") from error
        yield found
    finally:
        for name in reversed(made):
            _run("ip", "netns", "delete", name)


def _join(host: Host) -> None:
    peer = ["peer", "name", "eth0", "netns", host.name]
    _run("ip", "-n", host.hub, "link", "add", host.name, "type", "veth", *peer)
    _run("ip", "-n", host.hub, "link", "set", host.name, "master", "bridge", "up")
    _run("ip", "-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
    for link in ("eth0", "lo"):
        _run("ip", "-n", host.name, "link", "set", link, "up")
