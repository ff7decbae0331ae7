"""Network namespaces, each behind a link of a given speed, and what goes over the links."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import shutil
import subprocess
from pathlib import Path

# All that this module makes starts so, then comes the id of the process that made it.
PREFIX = "pkl"
_CLONE_NEWNET = 0x40000000
# The longest that a packet waits in the queue of a link, and how much may pass at once. Smaller
# bursts than one that TCP hands over in one piece would be cut up, which takes CPU time.
LATENCY, BURST = "400ms", "512kb"


class NoLaboratory(Exception):  # noqa: N818 (it is a finding about the machine)
    """Why there can be no laboratory on this machine, and what to do."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that went over one link.

    Attributes:
        sent: By the device.
        received: By the device.
    """

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        """What was added.

        >>> Traffic(5, 7).since(Traffic(1, 2))
        Traffic(sent=4, received=5)
        """
        return Traffic(self.sent - before.sent, self.received - before.received)

    @property
    def busiest(self) -> int:
        """The bytes of the direction that had more: a link carries both at the same time."""
        return max(self.sent, self.received)


def check() -> None:
    """Whether this machine can make links.

    Raises:
        NoLaboratory: If not.
    """
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise NoLaboratory(
            f"The laboratory of links needs iproute2. Not found: {', '.join(missing)}. Install it: "
            "apt-get install iproute2 (or dnf install iproute-tc)."
        )
    if os.geteuid() != 0:
        raise NoLaboratory(
            "The laboratory of links makes network namespaces, which only root may. "
            f"Received: user id {os.geteuid()}. Run it as root, in a container with "
            "--cap-add=NET_ADMIN --cap-add=SYS_ADMIN."
        )
    try:
        with Network(1) as network:
            network.limit(1000)
    except subprocess.CalledProcessError as error:
        raise NoLaboratory(
            f"This machine makes no network namespaces with limited links: {error.stderr.strip()} "
            "It needs a Linux kernel with veth, bridge and sch_tbf, and in a container "
            "--cap-add=NET_ADMIN --cap-add=SYS_ADMIN."
        ) from error


class Network:
    """Namespaces that are joined by a bridge; each has one address and one link.

    Args:
        count: Int, how many.
    """

    def __init__(self, count: int) -> None:
        self._bridge = f"{PREFIX}{os.getpid()}b"
        self.namespaces = [f"{PREFIX}{os.getpid()}n{index}" for index in range(count)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(count)]
        # The ends outside of the namespaces; a name of an interface has at most 15 letters.
        self._links = [f"{PREFIX}{os.getpid()}v{index}" for index in range(count)]

    def __enter__(self) -> Network:
        """Makes them."""
        remove_leftovers()
        lines = [f"link add {self._bridge} type bridge", f"link set {self._bridge} up"]
        for namespace, link in zip(self.namespaces, self._links, strict=True):
            lines += [
                f"netns add {namespace}",
                f"link add {link} type veth peer name eth0 netns {namespace}",
                f"link set {link} master {self._bridge} up",
            ]
        try:
            _run("ip", "-batch", "-", given="\n".join(lines))
            for namespace, address in zip(self.namespaces, self.addresses, strict=True):
                inside = f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up"
                _run("ip", "-n", namespace, "-batch", "-", given=inside)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Removes them."""
        self._remove()

    def limit(self, mbit: float | None) -> None:
        """Limits every link to so many Mbit/s in each direction, or to none.

        Args:
            mbit: Float, or `None` for no limit.
        """
        for namespace, link in zip(self.namespaces, self._links, strict=True):
            for where, device in (((), link), (("-n", namespace), "eth0")):
                with contextlib.suppress(subprocess.CalledProcessError):  # there was no limit
                    _run("tc", *where, "qdisc", "del", "dev", device, "root")
                if mbit is not None:
                    speed = ("rate", f"{mbit}mbit", "burst", BURST, "latency", LATENCY)
                    _run("tc", *where, "qdisc", "add", "dev", device, "root", "tbf", *speed)

    def traffic(self) -> list[Traffic]:
        """What each namespace has sent and received so far, counted by the kernel."""
        return [Traffic(_count(link, "rx"), _count(link, "tx")) for link in self._links]

    def _remove(self) -> None:
        _remove_all([self._bridge, *self._links], self.namespaces)


def enter(namespace: str) -> None:
    """Puts this thread, and those that it will start, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")


def remove_leftovers() -> None:
    """Removes what an earlier run left, whose process is gone."""
    links = [path.name for path in Path("/sys/class/net").glob(f"{PREFIX}[0-9]*")]
    folder = Path("/run/netns")
    namespaces = [path.name for path in folder.glob(f"{PREFIX}[0-9]*")] if folder.exists() else []
    _remove_all([n for n in links if _orphan(n)], [n for n in namespaces if _orphan(n)])


def maker(name: str) -> int:
    """The id of the process that made a link or namespace of this name.

    >>> maker("pkl4711v3")
    4711
    """
    digits = itertools.takewhile(str.isdigit, name.removeprefix(PREFIX))
    return int("".join(digits))


def _orphan(name: str) -> bool:
    return not Path(f"/proc/{maker(name)}").exists()


def _remove_all(links: list[str], namespaces: list[str]) -> None:
    for command in [("link", "del", name) for name in links] + [
        ("netns", "del", name) for name in namespaces
    ]:
        with contextlib.suppress(subprocess.CalledProcessError):  # it went with another, or before
            _run("ip", *command)


def _count(link: str, direction: str) -> int:
    return int(Path(f"/sys/class/net/{link}/statistics/{direction}_bytes").read_text())


def _run(*command: str, given: str | None = None) -> None:
    subprocess.run(command, input=given, capture_output=True, text=True, check=True)
