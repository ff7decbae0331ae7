"""From what users write to devices that exist."""

import collections
import subprocess
import sys
from typing import Any

import pytest
import tensorflow as tf

from parallel_keras import devices

Device = collections.namedtuple("Device", ["name", "device_type"])
CPU = ["/device:CPU:0"]
CPUS = [f"/device:CPU:{index}" for index in range(4)]
GPUS = CPU + [f"/device:GPU:{index}" for index in range(8)]
CLUSTER = CPU + [
    f"/job:worker/replica:0/task:{task}/device:{kind}:0"
    for task in (0, 1)
    for kind in ("CPU", "GPU")
]


def machine(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    found = [Device(name, "GPU" if "GPU" in name else "CPU") for name in names]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: found)


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (CPU, None, CPU),
        (GPUS, None, GPUS[1:]),
        (GPUS, 3, GPUS[1:4]),
        (CPU, 1, CPU),
        (GPUS, [0, 2], [GPUS[1], GPUS[3]]),
        (GPUS, [3, 1], [GPUS[4], GPUS[2]]),
        (GPUS, ["GPU:1"], [GPUS[2]]),
        (GPUS, ["gpu:1", "/gpu:2", "/GPU:3"], GPUS[2:5]),
        (GPUS, ["/device:GPU:7", "cpu:0"], [GPUS[8], GPUS[0]]),
        (GPUS, ("/device:gpu:1", "/CPU:0"), (GPUS[2], GPUS[0])),
        (GPUS, ["GPU"], [GPUS[1]]),
        (GPUS, ["/job:localhost/replica:0/task:0/device:CPU:0"], CPU),
        (GPUS, ["/job:localhost/replica:0/task:0/device:GPU:3"], [GPUS[4]]),
        (GPUS, ["/job:localhost/device:GPU:3", "/replica:0/task:0/gpu:1"], [GPUS[4], GPUS[2]]),
        (GPUS, range(2), GPUS[1:3]),
        (CPUS, None, CPUS),
        (CPUS, 2, CPUS[:2]),
        (CPUS, ["cpu:2", "CPU:0"], [CPUS[2], CPUS[0]]),
        (CLUSTER, ["/job:worker/task:1/device:CPU:0"], [CLUSTER[3]]),
        (CLUSTER, ["/job:worker/replica:0/task:0/device:GPU:0"], [CLUSTER[2]]),
    ],
)
def test_spellings(
    monkeypatch: pytest.MonkeyPatch, names: list[str], wanted: Any, expected: list[str]
) -> None:
    """C6, C7: https://github.com/keras-team/keras/issues/8516."""
    machine(monkeypatch, names)
    assert devices.resolve(wanted) == tuple(expected)


@pytest.mark.parametrize(
    ("names", "wanted", "error", "match"),
    [
        (GPUS, 9, ValueError, r"between 1 and 8.*devices=9.*GPU:7"),
        (GPUS, 0, ValueError, "between 1 and 8"),
        (CPU, 2, ValueError, r"between 1 and 1.*virtual_devices"),
        (GPUS, [], ValueError, "at least one device"),
        (GPUS, [8], ValueError, r"Received: 8, which does not exist.*GPU:7"),
        (CPU, [0], ValueError, r"which does not exist.*CPU:0"),
        (GPUS, ["TPU:0"], ValueError, "which does not exist"),
        (GPUS, ["/job:other/device:GPU:0"], ValueError, "which does not exist"),
        (GPUS, ["1"], ValueError, "device name|does not exist"),
        (GPUS, ["GPU:x"], ValueError, "Expected a device name"),
        (GPUS, ["GPU:1", 1], ValueError, r"/device:GPU:1 is named more than once"),
        (GPUS, "GPU:1", TypeError, r"Write devices=\['GPU:1'\]"),
        (GPUS, True, TypeError, "None, an int, or a list"),
        (GPUS, 1.5, TypeError, "None, an int, or a list"),
        (GPUS, [1.5], TypeError, "GPU id .int. or a device name"),
        (GPUS, [True], TypeError, "GPU id .int. or a device name"),
        (GPUS, [None], TypeError, "GPU id .int. or a device name"),
        (GPUS, {"GPU:1"}, TypeError, "None, an int, or a list"),
        (GPUS, -1, ValueError, r"between 1 and 8.*devices=-1"),
        (GPUS, [-1], ValueError, r"Received: -1, which does not exist.*GPU:7"),
        (GPUS, ["/physical_device:GPU:0"], ValueError, r"Expected a device name.*GPU:7"),
        (GPUS, [""], ValueError, r"which does not exist.*GPU:7"),
        (GPUS, [1, 2, 1], ValueError, r"GPU:1 is named more than once.*\[1, 2, 1\].*GPU:7"),
        (GPUS, ["/job:localhost/task:1/GPU:0"], ValueError, "which does not exist"),
        (CLUSTER, ["/job:worker/task:2/CPU:0"], ValueError, r"does not exist.*task:1"),
        (CLUSTER, ["/job:worker/replica:1/task:0/CPU:0"], ValueError, "does not exist"),
        (CLUSTER, ["/job:ps/replica:0/task:0/CPU:0"], ValueError, "does not exist"),
    ],
)
def test_errors(
    monkeypatch: pytest.MonkeyPatch, names: list[str], wanted: Any, error: Any, match: str
) -> None:
    machine(monkeypatch, names)
    with pytest.raises(error, match=match):
        devices.resolve(wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0,), ValueError, "at least 1"),
        ((1.5,), TypeError, "to be an int"),
        ((True,), TypeError, "to be an int"),
        ((2, "CPU", 100), ValueError, "no `memory_limit` for CPUs"),
        ((2, "GPU"), ValueError, "memory_limit=2048"),
        ((1, "TPU"), ValueError, r"type 'TPU', but there is none.*'CPU'"),
        ((3,), ValueError, "before TensorFlow starts its runtime"),
    ],
)
def test_virtual_devices_refuses(arguments: Any, error: Any, match: str) -> None:
    """The last one because the tests themselves have started TensorFlow, with 8."""
    with pytest.raises(error, match=match):
        devices.virtual_devices(*arguments)


def test_virtual_devices_before_and_after_the_start() -> None:
    """In processes of their own: nothing that the tests set up plays a part.

    The second is a fork of the first, from before either starts TensorFlow's runtime: so
    TensorFlow is imported once.
    """
    code = (
        "import os, keras, parallel_keras as pk, tensorflow as tf\n"
        "fork = os.fork()\n"
        "if fork:\n"
        "    names = pk.virtual_devices(3)\n"
        "    assert names == [d.name for d in tf.config.list_logical_devices('CPU')], names\n"
        "    assert names == ['/device:CPU:0', '/device:CPU:1', '/device:CPU:2']\n"
        "    assert pk.devices.resolve() == tuple(names)\n"
        "    assert os.waitpid(fork, 0)[1] == 0\n"
        "else:\n"
        "    tf.zeros(1)\n"
        "    try:\n"
        "        pk.virtual_devices(2)\n"
        "    except ValueError as error:\n"
        "        assert 'before TensorFlow starts its runtime' in str(error), error\n"
        "        assert 'count=2' in str(error) and 'top of the script' in str(error), error\n"
        "    else:\n"
        "        raise SystemExit('nothing was raised')\n"
        "    assert len(tf.config.list_logical_devices('CPU')) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_tensors_say_of_their_device_is_a_name() -> None:
    """A variable's device is what users have at hand."""
    with tf.device("/CPU:2"):
        where = tf.Variable(1.0).device
    assert devices.resolve([where]) == ("/device:CPU:2",)


@pytest.mark.parametrize("wanted", [99, [], ["TPU:0"], [7], ["GPU:x"], ["CPU:1", "cpu:1"]])
def test_errors_list_what_exists(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    machine(monkeypatch, CPUS)
    with pytest.raises(ValueError, match="Received") as caught:
        devices.resolve(wanted)
    for name in CPUS:
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["GPU", "gpu"])
def test_virtual_gpus_share_the_first_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["first", "second"])
    monkeypatch.setattr(
        tf.config, "set_logical_device_configuration", lambda *args: asked.append(args)
    )
    names = devices.virtual_devices(2, kind, memory_limit=100)
    assert names == ["/device:GPU:0", "/device:GPU:1"]
    [(device, parts)] = asked
    assert device == "first"
    assert [part.memory_limit for part in parts] == [100, 100]
    assert devices.virtual_devices(1, kind) == ["/device:GPU:0"]
