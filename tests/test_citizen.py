"""The same files and the same methods: what is saved, composed and asked."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, mlp, pair, rows

ALONE = """
import sys
sys.modules["parallel_keras"] = None  # importing it now fails
import keras, numpy as np
data = np.load(sys.argv[1])
for path in sys.argv[3:]:
    model = keras.saving.load_model(path)
    for load in (lambda path: None, model.load_weights):
        load(sys.argv[2])
        assert type(model) is keras.Sequential, type(model)
        np.testing.assert_array_equal(model.predict(data["x"], verbose=0), data["predicted"])
        assert int(model.optimizer.iterations) == int(data["iterations"])
        for index, weight in enumerate(model.get_weights()):
            np.testing.assert_array_equal(weight, data[f"w{index}"])
        model.set_weights([0 * weight for weight in model.get_weights()])
"""


def trained(towers: int = 3) -> pk.DataParallelModel:
    _, parallel = pair(mlp, towers, optimizer=lambda: keras.optimizers.Adam(0.01), loss="mse")
    parallel.fit(rows(10, 6), rows(10, 3, seed=1), batch_size=7, verbose=0)
    return parallel


def test_files_load_where_the_library_does_not_exist(tmp_path: Path) -> None:
    """S1, S8: https://github.com/keras-team/keras/issues/8123."""
    parallel = trained()
    full, weights = str(tmp_path / "full.keras"), str(tmp_path / "only.weights.h5")
    checkpoints = [
        keras.callbacks.ModelCheckpoint(full),
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
    ]
    x, y = rows(10, 6), rows(10, 3, seed=1)
    parallel.fit(x, y, batch_size=7, verbose=0, callbacks=checkpoints)
    saved = str(tmp_path / "saved.keras")
    parallel.save(saved)
    values = {f"w{index}": weight for index, weight in enumerate(parallel.get_weights())}
    np.savez(
        tmp_path / "data.npz", x=x, predicted=parallel.template.predict(x, verbose=0),
        iterations=int(parallel.optimizer.iterations), **values,
    )  # fmt: skip
    arguments = [sys.executable, "-c", ALONE, str(tmp_path / "data.npz"), weights, full, saved]
    subprocess.run(arguments, check=True, timeout=200)


def test_export_names_no_device(tmp_path: Path) -> None:
    """S6: https://github.com/keras-team/keras/issues/9083."""
    parallel = trained()
    parallel.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    x = rows(5, 6)
    np.testing.assert_allclose(served.serve(x), parallel(x), rtol=RTOL, atol=ATOL)
    content = (tmp_path / "served" / "saved_model.pb").read_bytes()
    assert b"device:GPU" not in content
    assert b"device:CPU:1" not in content


def test_composition() -> None:
    """In the middle of a bigger model, trained by plain Keras, called twice with shared weights."""

    def build(towers: int) -> keras.Model:
        keras.utils.set_random_seed(7)
        inner = mlp()
        inner = pk.DataParallelModel(inner, towers) if towers else inner
        a, b = keras.Input((6,)), keras.Input((6,))
        joined = inner(keras.layers.Dense(6)(a)) + inner(b)
        return keras.Model([a, b], keras.layers.Dense(2, name="last")(joined))

    x, y = [rows(10, 6), rows(10, 6, seed=1)], rows(10, 2, seed=2)
    models = [build(0), build(3)]
    for model in models:
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(x, y, batch_size=7, epochs=2, verbose=0, shuffle=False)
    for one, other in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=RTOL, atol=ATOL)
    assert models[1].output_shape == models[0].output_shape == (None, 2)


@pytest.mark.parametrize("how", ["save", "config", "clone", "copy", "pickle"])
def test_round_trips(how: str, tmp_path: Path) -> None:
    parallel = pk.DataParallelModel(
        mlp(), ["CPU:1", "CPU:2"], merge_device="CPU:3", loss_on="merged"
    )
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, parallel(inputs))
    path = str(tmp_path / "outer.keras")
    if how == "save":
        outer.save(path)
    again = {
        "save": lambda: keras.saving.load_model(path),
        "config": lambda: keras.Model.from_config(outer.get_config()),
        "clone": lambda: keras.models.clone_model(outer),
        "copy": lambda: copy.deepcopy(outer),
        "pickle": lambda: pickle.loads(pickle.dumps(outer)),
    }[how]()
    inner = next(layer for layer in again.layers if isinstance(layer, pk.DataParallelModel))
    assert inner.devices == ("/device:CPU:1", "/device:CPU:2")
    assert inner.merge_device == "/device:CPU:3"
    assert inner.loss_on == "merged"
    if how in ("config", "clone"):
        again.set_weights(outer.get_weights())
    x = rows(5, 6)
    np.testing.assert_allclose(again(x), outer(x), rtol=RTOL, atol=ATOL)


def test_config_is_not_changed_and_missing_devices_are_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = pk.DataParallelModel(mlp(), 2).get_config()
    config["devices"] = ["GPU:5", "GPU:6"]
    before = copy.deepcopy(config)
    revived = pk.DataParallelModel.from_config(config)
    assert config == before
    assert revived.num_towers == 8
    assert sum("which this machine does not have" in text for text in caplog.messages) == 1


def test_answers_as_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    """C1: https://github.com/keras-team/keras/issues/11929."""

    class Named(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = keras.layers.Dense(3, name="head")
            self.vocabulary = ["a", "b"]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.head(x)

        def describe(self) -> str:
            return f"{self.head.units} units"

    template = Named()
    template(rows(2, 6))
    parallel = pk.DataParallelModel(template, 2)
    assert parallel.get_layer("head") is template.head is parallel.layers[0]
    assert parallel.get_layer(index=0) is template.head
    assert parallel.describe() == "3 units"
    assert list(parallel.vocabulary) == ["a", "b"]
    assert parallel.count_params() == template.count_params() == 21
    parallel.summary()
    printed = capsys.readouterr().out
    assert printed.startswith("Data parallel on 2 towers: /device:CPU:0, /device:CPU:1\n")
    assert "head" in printed
    parallel.trainable = False
    assert not template.trainable
    assert parallel.trainable_weights == []
    inputs = keras.Input((6,))
    functional = pk.DataParallelModel(keras.Model(inputs, keras.layers.Dense(3)(inputs)), 2)
    for name in ("inputs", "outputs", "input_shape", "output_shape", "output_names"):
        assert getattr(functional, name) is not None


def test_masks_go_in_and_out() -> None:
    class Recurrent(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = keras.layers.LSTM(3, return_sequences=True)
            self.supports_masking = True

        def call(self, x: tf.Tensor, mask: Any = None) -> tf.Tensor:
            return self.lstm(x, mask=mask)

    tokens = np.array([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 1], [1, 1, 0, 0, 0]])
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    inner = Recurrent()
    expected = inner(embedded)
    actual = pk.DataParallelModel(inner, 3)(embedded)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(actual._keras_mask, tokens != 0)
    explicit = pk.DataParallelModel(inner, 3)(tf.constant(embedded), mask=tf.constant(tokens != 0))
    np.testing.assert_allclose(explicit, expected, rtol=RTOL, atol=ATOL)
