"""One script and servers on several hosts: network namespaces, each with a network of its own.

docs/multi-machine.md names the test of each row of its table.
"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.networks import Host, NoNetworksError, hosts
from tests.processes import Program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TIMEOUT = 20
START = 300.0  # A busy machine takes long to load TensorFlow.
FAILED = 3
DONE = "\nfailed\n"  # What a script says at last, not what TensorFlow says of its GPUs.
PORT, OWN_PORT = 2222, 2223


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(hosts(count))
        except NoNetworksError as error:
            pytest.skip(str(error))
        yield found


class Site:
    """A script's host and the servers' hosts, with what runs on them.

    Args:
        found: The hosts, the script's first.
        folder: For the logs.
    """

    def __init__(self, found: Sequence[Host], folder: Path) -> None:
        self.script, *self.hosts = found
        self.folder = folder
        self.running: list[Program] = []

    @property
    def addresses(self) -> list[str]:
        return [host.address(PORT) for host in self.hosts]

    def serve(self, *hosts: Host, clients: Sequence[Host] | None = None) -> list[Program]:
        """Starts servers."""
        let_in = ",".join(host.ip for host in clients or [self.script, *self.hosts])
        found = [
            self._run(
                host,
                [
                    *("parallel_keras", "serve", f"--address={host.address(PORT)}"),
                    *(f"--client={let_in}", f"--timeout={TIMEOUT}"),
                ],
            )
            for host in hosts or self.hosts
        ]
        for each in found:
            each.wait_for("Ctrl-C ends it", START)
        return found

    def run(self, task: str, timeout: float = TIMEOUT, own: str | None = None) -> Program:
        """Starts the script."""
        own = own or self.script.address(OWN_PORT)
        return self._run(
            self.script, ["tests.servers_client", task, str(timeout), own, *self.addresses]
        )

    def _run(self, host: Host, command: list[str]) -> Program:
        log = self.folder / f"{len(self.running)}_{host.ip}.txt"
        settings = {"TF_CPP_MIN_LOG_LEVEL": "2"}
        program = Program([*host.prefix, sys.executable, "-m", *command], log, settings)
        self.running.append(program)
        return program

    def end(self) -> None:
        for each in self.running:
            each.end()


@contextlib.contextmanager
def site(servers: int, folder: Path, more: int = 0) -> Iterator[tuple[Site, list[Host]]]:
    """The site, and hosts that have no part in it."""
    with network(1 + servers + more) as found:
        made = Site(found[: 1 + servers], folder)
        try:
            yield made, found[1 + servers :]
        finally:
            made.end()


def error_of(script: Program, since: float) -> str:
    """What the script said at last; after how long is printed only, as that is the machine's."""
    script.wait_for(DONE, START)
    assert script.wait(60) == FAILED
    found = re.search(r"^(\d+\.\d+) (\w+Error: .*)$", script.said, re.MULTILINE)
    assert found, script.said[-3000:]
    print(f"after {float(found[1]) - since:.1f} s: {found[2][:250]}")
    return found[2]


@pytest.mark.parametrize("servers", [2, 4])
def test_numbers_are_equal(servers: int, tmp_path: Path) -> None:
    """F1: fit, evaluate, predict, a call, uneven batches, synchronised layers, a large table."""
    with site(servers, tmp_path) as (found, _):
        found.serve()
        script = found.run("numbers", timeout=60)
        assert script.wait(START) == 0, script.said[-3000:]
        assert "equal" in script.said
        for host in found.hosts:
            assert min(host.counted()) > 100_000  # They did take part.


# What noticed it says so.
FAULTS = {
    "killed": "calls are refused",
    "frozen": "it is frozen",
    "cut off": "no answer: the machine is off, cut off",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_is_gone_in_mid_epoch(fault: str, tmp_path: Path) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/35878: named."""
    with site(2, tmp_path) as (found, _):
        _, second = found.serve()
        script = found.run("train")
        script.wait_for("epoch 1 batch 2", START)
        since = time.time()
        if fault == "cut off":
            found.hosts[1].cut()
        else:
            second.send(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        text = error_of(script, since)
        assert text.startswith("ConnectionError: This script cannot go on, because a server is go")
        assert f"worker 1 ({found.addresses[1]}): {FAULTS[fault]}" in text
        assert "worker 0" not in text


def part(one: Host, other: Host) -> None:
    """Two hosts no longer reach each other, but all others."""
    for here, there in ((one, other), (other, one)):
        command = ["ip", "-n", here.name, "route", "add", "blackhole", f"{there.ip}/32"]
        subprocess.run(command, check=True, timeout=10)


def test_servers_lose_each_other_in_mid_epoch(tmp_path: Path) -> None:
    """The script still reaches both, so only the servers can notice."""
    with site(2, tmp_path) as (found, _):
        found.serve()
        script = found.run("train synchronized")
        script.wait_for("epoch 1 batch 2", START)
        since = time.time()
        part(*found.hosts)
        text = error_of(script, since)
        assert "ConnectionError: This script cannot go on, because a server is gone" in text
        assert "it answers now, but its connection to this script or another server" in text


def test_a_short_cut_is_no_fault(tmp_path: Path) -> None:
    """A cable that is plugged in again in time: training goes on."""
    with site(2, tmp_path) as (found, _):
        found.serve()
        script = found.run("train")
        script.wait_for("epoch 0 batch 2", START)
        found.hosts[1].cut()
        time.sleep(TIMEOUT / 6)
        found.hosts[1].plug_in()
        script.wait_for("epoch 2 batch 5", START)
        assert DONE not in script.said


def test_servers_that_start_late_are_waited_for(tmp_path: Path) -> None:
    with site(2, tmp_path) as (found, _):
        script = found.run("some", timeout=120)
        found.serve(found.hosts[0])
        time.sleep(3)
        found.serve(found.hosts[1])
        assert script.wait(START) == 0, script.said[-3000:]
        assert "equal" in script.said


def test_a_slow_link_is_no_fault(tmp_path: Path) -> None:
    """20 Mbit/s, and still the numbers of one device."""
    with site(2, tmp_path) as (found, _):
        for host in found.hosts:
            host.slow("20mbit")
        found.serve()
        script = found.run("numbers")
        assert script.wait(START) == 0, script.said[-3000:]
        assert "equal" in script.said


def test_servers_that_cannot_reach_the_script(tmp_path: Path) -> None:
    """The address exists, but no server has a way to it."""
    with site(1, tmp_path) as (found, _):
        found.serve(clients=[found.script, *found.hosts])
        subprocess.run(
            ["ip", "-n", found.script.name, "addr", "add", "10.99.0.1/24", "dev", "eth0"],
            check=True,
            timeout=10,
        )
        since = time.time()
        text = error_of(found.run("some", own=f"10.99.0.1:{OWN_PORT}"), since)
        assert "ConnectionError: The servers cannot fetch tensors from this script" in text
        assert f"every server reaches 10.99.0.1:{OWN_PORT}" in text


def test_servers_that_cannot_reach_each_other(tmp_path: Path) -> None:
    with site(2, tmp_path) as (found, _):
        first, second = found.hosts
        found.serve()
        part(first, second)
        text = error_of(found.run("some"), time.time())
        assert "ConnectionError: The servers cannot fetch tensors from this script or from" in text
        assert any(address in text for address in found.addresses)


_CALL = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()
"""


def reaches(host: Host, other: Host, port: int) -> bool:
    command = [*host.prefix, sys.executable, "-c", _CALL, other.ip, str(port)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_strangers_are_not_let_in(tmp_path: Path) -> None:
    """Neither by a server nor by the script; who was not named cannot connect either."""
    if not hasattr(socket, "SO_INCOMING_CPU"):
        pytest.skip("Only Linux filters by socket.")
    with site(1, tmp_path, more=1) as (found, (stranger,)):
        found.serve()
        script = found.run("train")
        script.wait_for("connected", START)
        (server,) = found.hosts
        assert reaches(found.script, server, PORT)
        assert reaches(server, found.script, OWN_PORT)
        assert not reaches(stranger, server, PORT)
        assert not reaches(stranger, found.script, OWN_PORT)
        script.end()
        other = Site([stranger, server], tmp_path / "stranger")
        other.folder.mkdir()
        try:
            since = time.time()
            text = error_of(other.run("some", timeout=5), since)
        finally:
            other.end()
        assert "TimeoutError: Not all servers answered within 5 s" in text
        assert f"worker 0 ({server.address(PORT)}): no answer" in text
        assert "let this machine in with --client" in text
