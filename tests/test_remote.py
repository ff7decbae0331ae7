"""Towers on the devices of other processes: `devices=["/job:worker/task:0/device:CPU:0", ...]`.

Two `tf.distribute.Server`s on loopback, and `remote_client.py` as the one script that uses them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from parallel_keras.commands.workers import free_ports

# Ends when this process ends, however that happens: then its standard input does.
_SERVE = """
import json, sys
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(4)
index, addresses = int(sys.argv[1]), sys.argv[2:]
server = tf.distribute.Server({"worker": addresses}, job_name="worker", task_index=index)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[list[str], list[subprocess.Popen[str]]]]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(index), *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield addresses, processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def cases(servers: Any) -> dict[str, dict[str, Any]]:
    """What each case of the client came to."""
    addresses, processes = servers
    pids = [str(process.pid) for process in processes]
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote_client", *addresses, *pids],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    assert found, done.stderr
    return {case["name"]: case for case in found}


@pytest.mark.parametrize(
    "case", ["towers", "merged", "normalised", "synchronized", "table, towers", "table, merged"]
)
def test_numbers_are_equal(cases: Any, case: str) -> None:
    """fit, evaluate, predict and a call, with uneven batches; also a local device among them."""
    assert "error" not in cases[case], cases[case]["error"]


def test_synchronized_layers_need_one_job(cases: Any) -> None:
    message = cases["mixed"]["result"]
    assert "ValueError: A layer with synchronized=True adds up over all towers" in message
    assert "Received: devices=['/device:CPU:0', '/job:worker/replica:0/task:1/dev" in message


def test_a_server_that_does_not_exist(cases: Any) -> None:
    message = cases["unknown"]["result"]
    assert "ValueError" in message
    assert "'/job:worker/task:7/device:CPU:0', which does not exist" in message
    assert "/job:worker/replica:0/task:1/device:CPU:0" in message


def test_by_default_connected_devices_are_used_too(cases: Any) -> None:
    assert cases["default"]["result"] == [
        "/device:CPU:0",
        "/device:CPU:1",
        "/job:worker/replica:0/task:0/device:CPU:0",
        "/job:worker/replica:0/task:1/device:CPU:0",
    ]


@pytest.mark.parametrize("method", ["fit", "predict", "call"])
def test_a_server_that_dies_is_named(cases: Any, method: str) -> None:
    """W2, https://github.com/tensorflow/tensorflow/issues/35878: a dead peer is no hang."""
    _, message = cases["dies"]["result"][method]
    assert message.startswith("UnavailableError")
    assert "/job:worker/replica:0/task:1" in message
