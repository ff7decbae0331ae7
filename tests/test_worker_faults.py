"""What the other workers do when one of them is gone, stuck, cut off or different.

docs/multi-machine.md names the test of each row of its table.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import Process, started
from tests.worker_cases import mlp
from tests.worker_faults import FAILED, data, train

# Each starts workers, and waits until they notice.
pytestmark = pytest.mark.slow

MODULE = "tests.worker_faults"
TIMEOUT = 20
START = 150.0  # A busy machine takes long to load TensorFlow.


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "timeout": TIMEOUT, "towers": 1, "pause": 0.3} | more


def error_of(worker: Process, since: float) -> str:
    """What its error says; after how long is printed only, as a loaded machine takes longer."""
    worker.wait_for("failed", TIMEOUT + 40)
    assert worker.wait(20) == FAILED
    found = re.search(r"^(\d+\.\d+) (\w+Error: .*)$", worker.said, re.MULTILINE)
    assert found, worker.said[-3000:]
    print(f"{worker.address}: {float(found[1]) - since:.1f} s: {found[2][:200]}")
    return found[2]


def unbroken() -> list[np.ndarray]:
    model = mlp()
    train(model, [])
    return [variable.numpy() for variable in model.variables]


@pytest.mark.timeout(400)
def test_killed_then_restarted_with_fewer(tmp_path: Path) -> None:
    """W2, F3: https://github.com/tensorflow/tensorflow/issues/42498.

    The others raise an error that names the worker. Started again without it, they go on
    from the last backup, and end as a run that nothing happened to.
    """
    more = {"backup": str(tmp_path / "backup")}
    with started(MODULE, settings(tmp_path, **more), 2) as workers:
        workers[0].wait_for("epoch 1 batch 2", START)
        workers[1].send(signal.SIGKILL)
        text = error_of(workers[0], time.time())
        assert "ConnectionError: Training cannot go on" in text
        assert f"worker 1 ({workers[1].address})" in text
    assert (tmp_path / "backup" / "latest.weights.h5").exists()
    with started(MODULE, settings(tmp_path, pause=0, towers=2, **more), 1) as workers:
        assert workers[0].wait(START) == 0, workers[0].said[-3000:]
        assert "epoch 0" not in workers[0].said
        assert "epoch 2 batch 5" in workers[0].said
    with np.load(tmp_path / "worker_0.npz") as found:
        for key, value in zip(found.files, unbroken(), strict=True):
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=3e-6)
    assert not (tmp_path / "backup").exists()  # deleted at the end, as on one device


@pytest.mark.timeout(300)
def test_frozen(tmp_path: Path) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/35878."""
    with started(MODULE, settings(tmp_path), 2) as workers:
        workers[0].wait_for("epoch 0 batch 2", START)
        workers[1].send(signal.SIGSTOP)
        text = error_of(workers[0], time.time())
        assert f"worker 1 ({workers[1].address})" in text


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("template", r"worker 1 \(127.0.0.1:\d+\) has another template.*\(7, 3\).*\(7, 4\)"),
        ("batches", "The workers were fed different batches"),
    ],
)
def test_workers_that_differ_are_refused(wrong: str, expected: str, tmp_path: Path) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/36153."""
    with started(MODULE, settings(tmp_path, wrong=wrong, pause=0), 2) as workers:
        for worker in workers:
            assert worker.wait(START) == FAILED, worker.said[-3000:]
            assert re.search(expected, worker.said, re.DOTALL), worker.said[-3000:]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with an address each, joined by a cable."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("Cutting a cable needs root and iproute2's `ip`.")
    names = [f"pk{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    made = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
            for name, address in zip(names, addresses, strict=True):
                _ip("link", "set", name, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"This machine allows no network namespaces: {error.stderr!r}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in made:
            _ip("netns", "delete", name)


@pytest.mark.timeout(350)
def test_cut_off(namespaces: list[tuple[str, str]], tmp_path: Path) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/37112.

    Nobody is killed: the cable is cut, and both sides say so.
    """
    addresses = [f"{address}:23456" for _, address in namespaces]
    workers = []
    try:
        for index, (name, _) in enumerate(namespaces):
            prefix = ["ip", "netns", "exec", name]
            workers.append(Process(MODULE, settings(tmp_path), addresses, index, prefix))
        workers[0].wait_for("epoch 0 batch 2", START)
        name = namespaces[1][0]
        _ip("-n", name, "link", "set", name, "down")
        since = time.time()
        for worker, other in ((workers[0], 1), (workers[1], 0)):
            text = error_of(worker, since)
            assert f"worker {other} ({addresses[other]})" in text
    finally:
        for worker in workers:
            worker.end()


def test_data_has_an_uneven_tail() -> None:
    assert len(data()[0]) % 4
