"""The promise: the same numbers as one device, for every batch size and number of towers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import shard
from tests.parity import (
    ATOL,
    RTOL,
    assert_same_fit,
    assert_same_variables,
    batches,
    mlp,
    pair,
    rows,
)

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
}


def _sizes(towers: int) -> list[int]:
    """Every size from 1 to 3N+1, at least 20 batches, not in order."""
    sizes = list(range(1, 3 * towers + 2))
    return (sizes * 20)[: max(20, len(sizes))][::-1]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("towers", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_batch_size(towers: int, loss_on: str, optimizer: str) -> None:
    """N1, N3, B1: https://github.com/tensorflow/tensorflow/issues/36224."""
    sizes = _sizes(towers)
    x, y = rows(sum(sizes), 6), rows(sum(sizes), 3, seed=1)
    bare, parallel = pair(
        mlp, towers, loss_on=loss_on, optimizer=OPTIMIZERS[optimizer], loss="mse", metrics=["mae"]
    )
    assert_same_fit(bare, parallel, batches(sizes, x, y), epochs=1)
    assert int(parallel.optimizer.iterations) == len(sizes)
    data = batches(sizes, x, y)
    expected, actual = bare.evaluate(data, verbose=0), parallel.evaluate(data, verbose=0)
    np.testing.assert_allclose(actual, expected, rtol=RTOL)
    np.testing.assert_allclose(
        parallel.predict(data, verbose=0), bare.predict(data, verbose=0), rtol=RTOL, atol=ATOL
    )


@pytest.mark.sweep(4)
@pytest.mark.parametrize("towers", [3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_known_batch_size(towers: int, count: int) -> None:
    """Sizes that TensorFlow knows while tracing are cut without stand-in rows."""
    x, y = rows(count, 6), rows(count, 3, seed=1)
    bare, parallel = pair(mlp, towers, optimizer=OPTIMIZERS["sgd"], loss="mse")
    for model in (bare, parallel):
        for _ in range(3):
            model.train_on_batch(x, y)
    assert_same_variables(bare, parallel)
    np.testing.assert_allclose(
        parallel.predict_on_batch(x), bare.predict_on_batch(x), rtol=RTOL, atol=ATOL
    )
    np.testing.assert_allclose(parallel.test_on_batch(x, y), bare.test_on_batch(x, y), rtol=RTOL)


def test_33_rows_in_batches_of_32_on_4_towers() -> None:
    """The case in which MirroredStrategy is off by 2e-1 (`python -m benchmarks.parity`)."""
    x, y = rows(33, 6), rows(33, 3, seed=1)
    bare, parallel = pair(mlp, 4, optimizer=OPTIMIZERS["sgd"], loss="mse", metrics=["mae"])
    assert_same_fit(bare, parallel, x, y, batch_size=32, epochs=2, validation_data=(x[:5], y[:5]))


class CountsRows(keras.layers.Layer):
    """Notes how many rows it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def call(self, x: tf.Tensor) -> tf.Tensor:
        shape = x.shape

        def note(value: np.ndarray) -> np.ndarray:
            self.seen.append(len(value))
            return value

        x = tf.numpy_function(note, [x], tf.float32)
        x.set_shape(shape)
        return x


@pytest.mark.parametrize("count", [1, 3, 9])
def test_no_tower_sees_an_empty_batch(count: int) -> None:
    """N1: a tower with 0 rows turns batch statistics into NaN."""
    layer = CountsRows()
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((6,)), layer]), 8)
    x = rows(count, 6)
    np.testing.assert_array_equal(parallel.predict(batches([count], x), verbose=0), x)
    assert layer.seen
    assert min(layer.seen) == 1 if count <= 8 else 1
    layer.seen.clear()
    parallel(x)
    assert sorted(layer.seen, reverse=True) == shard.row_counts(count, 8)


def test_empty_batch_gives_empty_output() -> None:
    parallel = pk.DataParallelModel(mlp(), 4)
    assert parallel(np.zeros((0, 6), "float32")).shape == (0, 3)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_eagerly(loss_on: str) -> None:
    x, y = rows(11, 6), rows(11, 3, seed=1)
    bare, parallel = pair(
        mlp, 4, loss_on=loss_on, optimizer=OPTIMIZERS["adam"], loss="mse", run_eagerly=True
    )
    assert_same_fit(bare, parallel, x, y, batch_size=5, epochs=2)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_steps_per_execution(loss_on: str) -> None:
    x, y = rows(33, 6), rows(33, 3, seed=1)
    bare, parallel = pair(
        mlp, 4, loss_on=loss_on, optimizer=OPTIMIZERS["adam"], loss="mse", steps_per_execution=3
    )
    assert_same_fit(bare, parallel, x, y, batch_size=4, epochs=2)
    np.testing.assert_allclose(
        parallel.predict(x, batch_size=4, verbose=0),
        bare.predict(x, batch_size=4, verbose=0),
        rtol=RTOL,
        atol=ATOL,
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_compiled_by_xla(loss_on: str) -> None:
    """P5: the towers compile, never the step around them."""
    x, y = rows(33, 6), rows(33, 3, seed=1)
    bare, parallel = pair(
        mlp, 4, loss_on=loss_on, optimizer=OPTIMIZERS["adam"], loss="mse", jit_compile=True
    )
    assert_same_fit(bare, parallel, x, y, batch_size=8, epochs=2)
    assert not parallel.jit_compile


@pytest.mark.parametrize("traced", [False, True])
def test_gradient_tape(traced: bool) -> None:
    """C8: https://github.com/keras-team/keras/issues/14104."""
    bare, parallel = pair(mlp, 4, optimizer="sgd", loss="mse")
    x = tf.constant(rows(10, 6))

    def gradients(model: keras.Model) -> list[tf.Tensor]:
        weights = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(model(x, training=True)))
        return tape.gradient(loss, [x, *weights])

    take = tf.function(gradients) if traced else gradients
    for actual, expected in zip(take(parallel), gradients(bare), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def test_gradient_of_gradient() -> None:
    """C5: a gradient penalty, as in WGAN-GP."""
    bare, parallel = pair(mlp, 3, optimizer="sgd", loss="mse")
    x = tf.constant(rows(7, 6))

    @tf.function
    def penalty(model: keras.Model) -> list[tf.Tensor]:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = model(x)
            loss = tf.reduce_sum(tf.square(inner.gradient(y, x))) + tf.reduce_mean(y)
        return outer.gradient(loss, [variable.value for variable in model.trainable_variables])

    for actual, expected in zip(penalty(parallel), penalty(bare), strict=True):
        if expected is None:
            assert actual is None or not np.any(actual)
        else:
            np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def test_one_tower_is_bit_for_bit_the_template() -> None:
    def build() -> keras.Model:
        layers = [keras.Input((6,)), keras.layers.Dense(7), keras.layers.Dropout(0.5, seed=3)]
        return keras.Sequential([*layers, keras.layers.BatchNormalization(), keras.layers.Dense(3)])

    x, y = rows(33, 6), rows(33, 3, seed=1)
    bare, parallel = pair(build, 1, optimizer=OPTIMIZERS["adam"], loss="mse")
    for model in (bare, parallel):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    for one, other in zip(bare.variables, parallel.variables, strict=True):
        np.testing.assert_array_equal(other.numpy(), one.numpy())
