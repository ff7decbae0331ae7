"""The historical contract of multi_gpu_model."""

import collections
from pathlib import Path
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
    with pytest.raises(
        ValueError, match=rf"at least 2.*gpus={gpus}. Devices of this machine.*GPU:3"
    ):
        pk.multi_gpu_model(mlp(), gpus)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("gpus", [[1], ["GPU:1"]])
def test_one_is_not_enough(gpus: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"name at least 2 devices.*DataParallelModel"):
        pk.multi_gpu_model(mlp(), gpus)


def test_without_gpus() -> None:
    with pytest.raises(
        ValueError, match=r"gpus=None\. Devices of this machine: \['/device:CPU:0', "
    ):
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


def small() -> keras.Model:
    keras.utils.set_random_seed(5)
    with tf.device("/CPU:3"):
        return mlp()


def test_weights_stay_where_they_are_by_default() -> None:
    model = small()
    pk.multi_gpu_model(model, ["CPU:1", "CPU:2"])
    assert {variable.value.device[-5:] for variable in model.variables} == {"CPU:3"}


@pytest.mark.parametrize("cpu_merge", [True, False])
def test_names_of_cpus(cpu_merge: bool) -> None:
    parallel = pk.multi_gpu_model(mlp(), ("CPU:2", "/cpu:1"), cpu_merge=cpu_merge)
    assert parallel.devices == ("/device:CPU:2", "/device:CPU:1")
    assert parallel.merge_device == ("/device:CPU:0" if cpu_merge else "/device:CPU:2")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("gpus", [True, "GPU:1", 2.0, {0, 1}])
def test_other_types_are_refused(gpus: Any) -> None:
    with pytest.raises(TypeError, match="Received: devices="):
        pk.multi_gpu_model(mlp(), gpus)


@pytest.mark.parametrize("relocated", [False, True])
def test_relocation_changes_no_number(relocated: bool) -> None:
    """Uneven batches, against the bare model on one device."""
    bare, x, y = small(), rows(11, 6), rows(11, 3, seed=1)
    parallel = pk.multi_gpu_model(small(), ["CPU:1", "CPU:2"], cpu_relocation=relocated)
    for model in (bare, parallel):
        model.compile("adam", "mse")
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(bare.get_weights(), parallel.template.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("relocated", [False, True])
def test_a_model_that_was_trained_before_goes_on(relocated: bool) -> None:
    """Its optimizer knows the very variables."""
    model = small()
    model.compile("adam", "mse")
    model.fit(rows(8, 6), rows(8, 3), verbose=0)
    parallel = pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=relocated)
    parallel.fit(rows(8, 6), rows(8, 3), verbose=0)
    assert int(model.optimizer.iterations.value) == 2


@pytest.mark.parametrize("relocated", [False, True])
def test_a_model_that_has_predicted_before_predicts_with_its_new_weights(relocated: bool) -> None:
    """It is the model itself that is trained, whatever Keras has traced of it."""
    model, x = small(), rows(8, 6)
    model.compile("adam", "mse")
    model.predict(x, verbose=0)
    parallel = pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=relocated)
    parallel.fit(x, rows(8, 3), epochs=5, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-5, atol=1e-6)


def test_a_model_that_is_refused_is_not_moved() -> None:
    with tf.device("/CPU:3"):
        model = keras.Sequential([keras.Input((3,), batch_size=8), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="fixed batch size"):
        pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=True)
    assert {variable.value.device[-5:] for variable in model.variables} == {"CPU:3"}


def test_relocation_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"Expected `template` to be a keras\.Model"):
        pk.multi_gpu_model(None, ["CPU:1", "CPU:2"], cpu_relocation=True)


def test_relocation_keeps_what_the_optimizer_knows() -> None:
    """Slots, what weight decay leaves out, and the numbers, against a model that never moved."""

    def compiled() -> keras.Model:
        model = small()
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.3), "mse")
        model.optimizer.exclude_from_weight_decay(var_list=[model.weights[0]])
        return model

    x, y = rows(11, 6), rows(11, 3, seed=1)
    bare, moved = compiled(), compiled()
    for model in (bare, moved):
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    parallel = pk.multi_gpu_model(moved, ["CPU:1", "CPU:2"], cpu_relocation=True)
    places = {variable.value.device[-5:] for variable in moved.optimizer.variables}
    assert places == {"CPU:0"}
    for model in (bare, parallel):
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(bare.optimizer.variables, moved.optimizer.variables, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-5, atol=2e-6)
    for one, other in zip(bare.get_weights(), moved.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6)


def test_a_relocated_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model, x = small(), rows(8, 6)
    parallel = pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=True)
    parallel.compile("sgd", "mse")
    parallel.fit(x, rows(8, 3), verbose=0)
    parallel.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_was_traced_before_the_relocation_fails_aloud() -> None:
    """Rather than go on with weights that are no longer trained."""
    model, x = small(), tf.constant(rows(8, 6))
    traced = tf.function(model)
    traced(x)
    pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=True)
    with pytest.raises(tf.errors.OpError, match=r"(?i)matrix|shape"):
        traced(x)


def test_relocation_needs_weights() -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"has none yet. Received: model=.*Call it on a batch"):
        pk.multi_gpu_model(model, ["CPU:1", "CPU:2"], cpu_relocation=True)
