"""What the private parts of Keras do today, and that there is still no public way."""

import re
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import _compat
from tests.parity import mlp, rows

PACKAGE = Path(pk.__file__).parent


def compiled() -> keras.Model:
    model = mlp()
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(rows(4, 6), rows(4, 3), verbose=0)
    return model


def test_masks_are_an_attribute_of_tensors() -> None:
    embedded = keras.layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(_compat.get_mask(embedded), [[True, False]])
    other = tf.zeros((1, 2, 2))
    assert _compat.get_mask(other) is None
    _compat.set_mask(other, _compat.get_mask(embedded))
    assert _compat.get_mask(keras.layers.Activation("relu")(other)) is not None
    assert not [name for name in dir(keras.ops) if "mask" in name]


def test_stateless_scope_cannot_be_queried() -> None:
    assert not _compat.in_stateless_scope()
    with keras.StatelessScope():
        assert _compat.in_stateless_scope()
    assert not hasattr(keras, "in_stateless_scope")


def test_compile_arguments_are_the_very_objects() -> None:
    optimizer, metric = keras.optimizers.SGD(), keras.metrics.MeanAbsoluteError()
    model = mlp()
    model.compile(optimizer, "mse", metrics=[metric])
    arguments = _compat.compile_arguments(model)
    assert arguments["optimizer"] is optimizer
    assert arguments["metrics"][0] is metric
    assert arguments["loss"] == "mse"
    public = model.get_compile_config()
    assert public["optimizer"] is not optimizer


def test_loss_arguments_are_not_in_the_config() -> None:
    loss = keras.losses.CosineSimilarity(axis=0)
    assert _compat.loss_arguments(loss)["axis"] == 0
    assert "axis" not in loss.get_config()
    assert _compat.loss_arguments(keras.losses.Loss()) == {}


def test_compiled_losses_and_metrics() -> None:
    model = compiled()
    y, y_pred = tf.constant(rows(4, 3)), model(rows(4, 6))
    expected = np.mean((y - y_pred) ** 2)
    np.testing.assert_allclose(_compat.data_loss(model, y, y_pred, None), expected, rtol=1e-6)
    assert [metric.name for metric in _compat.compiled_metrics(model)] == ["mae"]
    model.reset_metrics()
    _compat.update_metrics(model, y, y_pred, None)
    np.testing.assert_allclose(
        _compat.compiled_metrics(model)[0].result(), np.mean(abs(y - y_pred)), rtol=1e-6
    )
    assert _compat.loss_trackers(model) == []


def test_losses_and_metrics_can_be_built_from_shapes() -> None:
    template = mlp()
    parallel = pk.DataParallelModel(template, 2)
    parallel.compile("sgd", ["mse"], metrics=["mae"])
    assert _compat.compiled_metrics(parallel) == []
    data = (tf.zeros((4, 6)), tf.zeros((4, 3)), None)
    _compat.build_losses_and_metrics(parallel, data)
    assert [metric.name for metric in _compat.compiled_metrics(parallel)] == ["mae"]
    assert _compat.is_dense(data)
    assert not _compat.is_dense([tf.ragged.constant([[1], []])])
    assert not _compat.is_dense({"a": tf.sparse.from_dense([[1]])})


def test_layers_of_layers_have_no_public_list() -> None:
    inner = keras.layers.Dense(2)
    outer = keras.layers.TimeDistributed(keras.layers.Bidirectional(keras.layers.LSTM(2)))
    model = keras.Sequential([keras.Input((3, 4, 5)), outer, inner])
    layers = _compat.all_layers(model)
    assert model in layers
    assert any(isinstance(layer, keras.layers.LSTM) for layer in layers)
    assert not hasattr(outer, "layers")


def test_metrics_of_a_compiled_model_mix_its_own_with_those_of_layers() -> None:
    class Tracks(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.tracker = keras.metrics.Mean(name="tracked")

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x

    model = keras.Sequential([keras.Input((3,)), Tracks(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    assert [metric.name for metric in _compat.layer_metrics(model)] == ["tracked"]
    assert "loss" in [metric.name for metric in model.metrics]


def test_variables_cannot_be_moved_publicly() -> None:
    variable = keras.Variable(np.arange(3.0), name="moved")
    _compat.move_variable(variable, "/CPU:2")
    assert variable.value.device.endswith("CPU:2")
    np.testing.assert_array_equal(variable.numpy(), np.arange(3.0))
    assert not hasattr(variable, "device")


def test_nothing_private_is_used_elsewhere() -> None:
    private = re.compile(r"keras\.src|tensorflow\.python|__internal__|\.extended\._")
    uses = [
        f"{path.name}: {line}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_compat.py"
        for line in path.read_text().splitlines()
        if private.search(line)
    ]
    assert uses == []
