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


def test_virtual_devices_before_the_start() -> None:
    code = (
        "import parallel_keras as pk, tensorflow as tf\n"
        "names = pk.virtual_devices(3)\n"
        "assert names == [d.name for d in tf.config.list_logical_devices('CPU')], names\n"
        "assert names == ['/device:CPU:0', '/device:CPU:1', '/device:CPU:2']\n"
        "assert pk.devices.resolve() == tuple(names)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
