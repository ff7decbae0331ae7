"""Workers on several hosts: network namespaces, each with a network of its own.

docs/multi-machine.md names the test of each row of its table.
"""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_keras.workers import cluster
from tests.networks import Host
from tests.processes import ROOT, Process
from tests.test_namespaces_servers import network
from tests.test_worker_faults import TIMEOUT, error_of, settings, unbroken
from tests.test_workers import ATOL, OWN, OWN_SIZES, RTOL
from tests.worker_cases import CASES, Bare
from tests.worker_faults import FAILED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAULTS = "tests.worker_faults"
PORT = 23456
START = 300.0  # A busy machine takes long to load TensorFlow.
NAMES = ("uneven_batches", "dict_inputs_and_normalization", "own_rows", "embedding")


def addresses_of(found: Sequence[Host]) -> list[str]:
    return [host.address(PORT) for host in found]


@contextlib.contextmanager
def workers_on(
    found: Sequence[Host], module: str, told: dict[str, Any], late: float = 0.0
) -> Iterator[list[Process]]:
    """A worker on each host; the last one starts later."""
    addresses = addresses_of(found)
    workers: list[Process] = []
    try:
        for index, host in enumerate(found):
            time.sleep(late if index == len(found) - 1 else 0.0)
            workers.append(Process(module, told, addresses, index, host.prefix))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def finish(workers: Sequence[Process]) -> None:
    for worker in workers:
        assert worker.wait(START) == 0, worker.said[-3000:]


def assert_unbroken(folder: Path, count: int) -> None:
    """Every worker ended with the weights of a run on one device that nothing happened to."""
    for index in range(count):
        with np.load(folder / f"worker_{index}.npz") as found:
            for key, value in zip(found.files, unbroken(), strict=True):
                np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=3e-6)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
@pytest.mark.parametrize("count", [2, 3])
def test_numbers_are_equal(count: int, tmp_path: Path) -> None:
    """W1: uneven batches, synchronised layers, own rows, sparse gradients."""
    told = {"folder": str(tmp_path), "timeout": 60, "cases": NAMES, "towers": 1}
    with network(count) as found, workers_on(found, "tests.worker_cases", told) as workers:
        finish(workers)
        for host in found:
            assert min(host.counted()) > 10_000
    ends = [dict(np.load(tmp_path / f"worker_{index}.npz")) for index in range(count)]
    for name in NAMES:
        for key, value in CASES[name](Bare(count, tmp_path)).items():
            for index, end in enumerate(ends):
                start = sum(OWN_SIZES[:index])
                own = value[start : start + OWN_SIZES[index]] if key.startswith(OWN) else value
                np.testing.assert_allclose(
                    end[f"{name}/{key}"],
                    own,
                    rtol=RTOL,
                    atol=ATOL * max(1.0, float(np.abs(value).max(initial=0))),
                    err_msg=f"{name}: {key} of worker {index}",
                )


@pytest.mark.parametrize("fault", ["frozen", "cut off"])
def test_a_worker_is_gone_in_mid_epoch(fault: str, tmp_path: Path) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/37112."""
    with network(2) as found, workers_on(found, FAULTS, settings(tmp_path)) as workers:
        workers[0].wait_for("epoch 0 batch 2", START)
        since = time.time()
        if fault == "frozen":
            workers[1].send(signal.SIGSTOP)
        else:
            found[1].cut()
        witnesses = [(0, 1)] if fault == "frozen" else [(0, 1), (1, 0)]
        for witness, other in witnesses:
            text = error_of(workers[witness], since)
            assert f"worker {other} ({workers[other].address})" in text


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_killed_then_restarted_with_others(before: int, after: int, tmp_path: Path) -> None:
    """F3: https://github.com/tensorflow/tensorflow/issues/42498.

    A worker is killed, all others name it; a run with another number of workers goes on from the
    backup and ends as one that nothing happened to.
    """
    told = settings(tmp_path, backup=str(tmp_path / "backup"))
    with network(max(before, after)) as found:
        with workers_on(found[:before], FAULTS, told) as workers:
            workers[0].wait_for("epoch 1 batch 2", START)
            since = time.time()
            workers[-1].send(signal.SIGKILL)
            for worker in workers[:-1]:
                text = error_of(worker, since)
                assert f"worker {before - 1} ({workers[-1].address})" in text
        assert (tmp_path / "backup" / "latest.weights.h5").exists()
        with workers_on(found[:after], FAULTS, told | {"pause": 0}) as workers:
            finish(workers)
            assert "epoch 0" not in workers[0].said
    assert_unbroken(tmp_path, after)


@pytest.mark.parametrize("name", ["latest.weights.h5", "training_metadata.json"])
def test_a_chief_that_dies_while_it_writes_a_backup(name: str, tmp_path: Path) -> None:
    """F2: the backup before stays whole, or the new one counts: no epoch is trained twice."""
    told = settings(tmp_path, backup=str(tmp_path / "backup"), pause=0)
    with network(2) as found:
        with workers_on(found, FAULTS, told | {"dies_writing": name}) as workers:
            assert workers[0].wait(START) == -signal.SIGKILL
            assert workers[1].wait(TIMEOUT + 40) == FAILED
            assert "worker 0" in workers[1].said
        with workers_on(found, FAULTS, told) as workers:
            finish(workers)
            epoch = "epoch 1" if name == "latest.weights.h5" else "epoch 2"
            assert f"{epoch} batch 0" in workers[0].said
            assert f"epoch {int(epoch[-1]) - 1} " not in workers[0].said
    assert_unbroken(tmp_path, 2)


def test_a_worker_that_joins_late(tmp_path: Path) -> None:
    """TensorFlow waits for it when the strategy is made."""
    told = settings(tmp_path, pause=0)
    with network(2) as found, workers_on(found, FAULTS, told, late=20.0) as workers:
        finish(workers)
    assert_unbroken(tmp_path, 2)


def test_a_slow_link_is_no_fault(tmp_path: Path) -> None:
    """10 Mbit/s."""
    with network(2) as found:
        for host in found:
            host.slow("10mbit")
        with workers_on(found, FAULTS, settings(tmp_path, pause=0)) as workers:
            finish(workers)
    assert_unbroken(tmp_path, 2)


def test_clocks_that_differ(tmp_path: Path) -> None:
    """Monotonic clocks, by a day: hosts have been up for different times.

    Linux gives all namespaces one time of day, so that one cannot differ here.
    """
    apart = ["unshare", "--time", "--monotonic", "86400", "--boottime", "86400", "--fork",
             "--kill-child"]  # fmt: skip
    tried = [*apart, "true"]
    if not shutil.which("unshare") or subprocess.run(tried, check=False, timeout=10).returncode:
        pytest.skip("Clocks that differ need `unshare --time`, as root.")
    told = settings(tmp_path, pause=0)
    with network(2) as found:
        addresses = addresses_of(found)
        prefixes = [found[0].prefix, [*found[1].prefix, *apart]]
        workers: list[Process] = []
        try:
            for index, prefix in enumerate(prefixes):
                workers.append(Process(FAULTS, told, addresses, index, prefix))
            finish(workers)
        finally:
            for worker in workers:
                worker.end()
    assert_unbroken(tmp_path, 2)


_TAKE = """
import socket, sys
taken = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """W4: `check_workers` says so on that host, and on the other who does not answer."""
    with network(2) as found:
        held = subprocess.Popen(
            [*found[1].prefix, sys.executable, "-c", _TAKE, found[1].ip, str(PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert held.stdout is not None
            assert held.stdout.readline() == b"taken\n"
            checks = [check(host, addresses_of(found), i) for i, host in enumerate(found)]
            said = [each.communicate(timeout=START)[0] for each in checks]
        finally:
            held.kill()
            held.communicate(timeout=20)
    assert [each.returncode for each in checks] == [1, 1]
    assert re.search(rf"cannot listen.*worker 1 \({found[1].address(PORT)}\)", said[1], re.DOTALL)
    assert "within 5 s" in said[0]
    assert f"worker 1 ({found[1].address(PORT)})" in said[0]


def check(host: Host, addresses: list[str], index: int) -> subprocess.Popen[str]:
    config = f"TF_CONFIG={cluster.write(addresses, index)}"
    command = ["-m", "parallel_keras", "cluster", "--timeout=5"]
    return subprocess.Popen(
        [*host.prefix, "env", config, sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_hosts_do_not_share_a_loopback() -> None:
    """What the tests above rest on: a port of one host is none of another."""
    with network(2) as found:
        held = subprocess.Popen(
            [*found[0].prefix, sys.executable, "-c", _TAKE, "127.0.0.1", str(PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert held.stdout is not None
            assert held.stdout.readline() == b"taken\n"
            call = f"import socket; socket.create_connection(('127.0.0.1', {PORT}), 2)"
            codes = [
                subprocess.run(
                    [*host.prefix, sys.executable, "-c", call],
                    capture_output=True,
                    check=False,
                    timeout=30,
                ).returncode
                for host in found
            ]
        finally:
            held.kill()
            held.communicate(timeout=20)
    assert codes == [0, 1]
