"""The historical contract of multi_gpu_model."""

import collections
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import mlp, rows

Device = collections.namedtuple("Device", ["name", "device_type"])


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Device("/device:CPU:0", "CPU")]
    found += [Device(f"/device:GPU:{index}", "GPU") for index in range(4)]
    monkeypatch.setattr(
        tf.config,
        "list_logical_devices",
        lambda kind=None: [device for device in found if kind in (None, device.device_type)],
    )


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("gpus", "ids"), [(None, [0, 1, 2, 3]), (2, [0, 1]), ([1, 3], [1, 3]), ((3, 0), [3, 0])]
)
def test_devices(gpus: Any, ids: list[int]) -> None:
    parallel = pk.multi_gpu_model(mlp(), gpus)
    assert parallel.devices == tuple(f"/device:GPU:{index}" for index in ids)
    assert parallel.merge_device == "/device:CPU:0"
    on_gpu = pk.multi_gpu_model(mlp(), gpus, cpu_merge=False)
    assert on_gpu.merge_device == parallel.devices[0]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("gpus", [0, 1, 5])
def test_number_must_fit(gpus: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 2.*gpus={gpus}. GPUs of this machine.*GPU:3"):
        pk.multi_gpu_model(mlp(), gpus)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("gpus", [[1], ["GPU:1"]])
def test_one_is_not_enough(gpus: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"name at least 2 devices.*DataParallelModel"):
        pk.multi_gpu_model(mlp(), gpus)


def test_without_gpus() -> None:
    with pytest.raises(ValueError, match=r"gpus=None. GPUs of this machine: \[\]"):
        pk.multi_gpu_model(mlp())


@pytest.mark.usefixtures("four_gpus")
def test_unknown_id() -> None:
    with pytest.raises(ValueError, match="7, which does not exist"):
        pk.multi_gpu_model(mlp(), [0, 7])


def test_relocation_trains_the_very_model() -> None:
    """S4: https://github.com/keras-team/keras/issues/11313."""
    with tf.device("/CPU:3"):
        model = mlp()
    before = model.get_weights()
    assert {variable.value.device[-5:] for variable in model.variables} == {"CPU:3"}
    parallel = pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=True)
    assert {variable.value.device[-5:] for variable in model.variables} == {"CPU:0"}
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert parallel.template is model
    parallel.compile("sgd", "mse")
    parallel.fit(rows(8, 6), rows(8, 3), verbose=0)
    assert not np.array_equal(model.get_weights()[0], before[0])
    assert isinstance(parallel, keras.Model)
