"""Templates of every kind: unbuilt, with more arguments, compiled before."""

import gc
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import (
    ATOL,
    RTOL,
    assert_same_fit,
    batches,
    mlp,
    pair,
    rng,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


class Unbuilt(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(20, 5)
        self.dense = keras.layers.Dense(3)

    def call(self, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.dense(keras.ops.mean(self.embed(tokens), axis=1))


def test_unbuilt_template() -> None:
    """C3: built from the first batch, as the bare model is."""
    x, y = rng().integers(0, 20, (10, 4)), rows(10, 3, seed=1)
    bare, parallel = pair(Unbuilt, 4, loss="mse", **SGD)
    assert not parallel.built
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    assert parallel.built
    bare, parallel = pair(lambda: keras.Sequential([keras.layers.Dense(3)]), 4, loss="mse", **SGD)
    assert_same_fit(bare, parallel, rows(10, 6), y, batch_size=7, epochs=2)


class TwoArguments(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, a: tf.Tensor, b: tf.Tensor, *, factor: float = 1.0) -> tf.Tensor:
        return self.dense(a) + factor * self.dense(b)


def test_extra_arguments_reach_every_tower() -> None:
    model = TwoArguments()
    a, b = tf.constant(rows(7, 6)), tf.constant(rows(7, 6, seed=1))
    expected = model(a, b, factor=2.0)
    parallel = pk.DataParallelModel(model, 3)
    np.testing.assert_allclose(parallel(a, b, factor=2.0), expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(parallel(a, b=b, factor=2.0), expected, rtol=RTOL, atol=ATOL)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("eager", [False, True])
def test_models_without_weights(loss_on: str, eager: bool) -> None:
    """One device takes them through `fit` too, which warns and trains nothing."""

    def build() -> keras.Model:
        layers = [keras.layers.Rescaling(0.5), keras.layers.BatchNormalization(synchronized=True)]
        layers[1].trainable = eager
        model = keras.Sequential([keras.Input((3,)), *layers[: 1 + (not eager)]])
        model.compile("adam", "mse", metrics=["mae"], run_eagerly=eager)
        return model

    bare, parallel = build(), pk.DataParallelModel(build(), 3, loss_on=loss_on)
    for size in (7, 2):
        data = rows(size, 3), rows(size, 3, seed=1)
        one, other = (model.fit(*data, batch_size=4, verbose=0) for model in (bare, parallel))
        for key, value in one.history.items():
            np.testing.assert_allclose(other.history[key], value, rtol=RTOL)
    assert int(parallel.optimizer.iterations) == int(bare.optimizer.iterations)


def test_variables_are_the_templates() -> None:
    """S4: https://github.com/keras-team/keras/issues/11313."""
    bare, parallel = pair(mlp, 4, loss="mse", **SGD)
    del bare
    assert parallel.variables
    for own, theirs in zip(parallel.variables, parallel.template.variables, strict=True):
        assert own is theirs


def test_inherits_compile() -> None:
    template = mlp()
    optimizer, metric = keras.optimizers.Adam(), keras.metrics.MeanAbsoluteError()
    template.compile(optimizer, "mse", metrics=[metric])
    parallel = pk.DataParallelModel(template, 2)
    assert parallel.optimizer is optimizer
    x, y = rows(10, 6), rows(10, 3, seed=1)
    history = parallel.fit(x, y, verbose=0).history
    assert set(history) == {"loss", "mean_absolute_error"}
    assert float(metric.result()) == pytest.approx(history["mean_absolute_error"][0])


class ReadsBatchSize(keras.layers.Layer):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, (tf.shape(x)[0], 3, 2))[:, :, 0]


def test_layer_that_reads_the_batch_size() -> None:
    """It sees the size of its shard."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), ReadsBatchSize(), keras.layers.Dense(3)])

    x, y = rows(17, 6), rows(17, 3, seed=1)
    bare, parallel = pair(build, 4, loss="mse", **SGD)
    assert_same_fit(bare, parallel, batches([7, 2, 8], x, y), epochs=1)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["merged", "towers", "own tape", "one tower"])
def test_crossentropies_do_not_saturate(activation: str, how: str) -> None:
    """Keras computes them from the logits that it attaches to outputs, which towers lose."""

    def build() -> keras.Model:
        initializer = keras.initializers.RandomNormal(stddev=60.0, seed=3)
        dense = keras.layers.Dense(3, activation=activation, kernel_initializer=initializer)
        return keras.Sequential([keras.Input((6,)), dense])

    loss = "categorical_crossentropy" if activation == "softmax" else "binary_crossentropy"
    towers, loss_on = (
        (1, "auto") if how == "one tower" else (3, how if how != "own tape" else "auto")
    )
    bare, parallel = pair(build, towers, loss_on=loss_on, optimizer="sgd", loss=loss)
    x, y = rows(10, 6), np.eye(3, dtype="float32")[np.arange(10) % 3]
    if how != "own tape":
        assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=1)
        return
    gradients = []
    for model in (bare, parallel):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(getattr(keras.losses, loss)(y, model(x)))
        gradients.append([value, *tape.gradient(value, model.trainable_weights)])
    assert float(gradients[0][0]) > 20  # beyond what probabilities in float32 can tell
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("towers", [3, 1])
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
def test_the_graph_of_a_step_goes_with_its_model(loss_on: str, towers: int) -> None:
    """M5: https://github.com/tensorflow/tensorflow/issues/42616."""
    template = mlp()
    graphs: list[weakref.ref[Any]] = []

    class Noticing(pk.DataParallelModel):
        def train_step(self, data: Any) -> Any:
            graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
            return super().train_step(data)

    for _ in range(3):
        parallel = Noticing(template, towers, loss_on="merged" if towers == 1 else loss_on)
        parallel.compile("adam", "mse", metrics=["mae"])
        parallel.fit(rows(12, 6), rows(12, 3), batch_size=4, verbose=0)
    del parallel
    template.compile("sgd", "mse")  # the template holds on to the last optimizer
    gc.collect()
    assert len(graphs) >= 3
    assert [graph for graph in graphs if graph() is not None] == []
