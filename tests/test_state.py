"""What layers assign while towers run: one update, as on one device."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.towers.seeds import tower_seed
from tests.parity import ATOL, RTOL, assert_same_fit, batches, pair, rows


class Counts(keras.layers.Layer):
    """Keeps state of every kind that a layer may keep."""

    def __init__(self) -> None:
        super().__init__()

        def variable(name: str, dtype: str = "float32", **kwargs: Any) -> keras.Variable:
            return self.add_weight(
                shape=(), initializer="zeros", dtype=dtype, trainable=False, name=name, **kwargs
            )

        self.steps = variable("steps", "int32")
        self.rows = variable("rows", "int32")
        self.ever_large = variable("ever_large", "bool")
        self.average = variable("average")
        self.total = variable("total", aggregation="sum")
        self.declared_mean = variable("declared_mean", aggregation="mean")
        self.first = variable("first", aggregation="only_first_replica")
        self.of_rows = keras.metrics.Mean(name="of_rows")
        self.of_scalars = keras.metrics.Mean(name="of_scalars")
        self.auc = keras.metrics.AUC(num_thresholds=7, name="auc")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        mean = keras.ops.mean(x)
        self.steps.assign(self.steps + 1)
        self.rows.assign(self.rows + keras.ops.shape(x)[0])
        self.ever_large.assign(keras.ops.logical_or(self.ever_large, keras.ops.any(x > 2)))
        self.average.assign(0.9 * self.average + 0.1 * mean)
        self.total.assign(self.total + keras.ops.sum(x))
        self.declared_mean.assign(mean)
        self.first.assign(self.first + 1)
        self.of_rows.update_state(keras.ops.mean(x, axis=-1))
        self.of_scalars.update_state(mean)
        self.auc.update_state(keras.ops.cast(x[:, 0] > 0, "int32"), keras.ops.sigmoid(x[:, 1]))
        return x


def _state(model: keras.Model) -> list[keras.Variable]:
    metrics = model.layers[0].metrics
    return [*model.variables, *(variable for metric in metrics for variable in metric.variables)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sizes", [[8, 8], [10, 7], [3, 1]])
def test_every_kind_of_state(sizes: list[int], known: bool) -> None:
    """C11: https://github.com/tensorflow/tensorflow/issues/37834."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), Counts()])

    bare, parallel = pair(build, 4, optimizer="sgd", loss="mse")
    for index, size in enumerate(sizes):
        x = rows(size, 6, seed=index)
        bare(x)
        spec = tf.TensorSpec((size if known else None, 6))
        tf.function(parallel, input_signature=[spec])(tf.constant(x))
    for one, other in zip(_state(bare), _state(parallel), strict=True):
        np.testing.assert_allclose(
            other.numpy(), one.numpy(), rtol=RTOL, atol=ATOL, err_msg=one.path
        )
    assert int(parallel.layers[0].rows.value) == sum(sizes)
    assert int(parallel.layers[0].of_scalars.count.value) == len(sizes)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_spectral_normalization(loss_on: str) -> None:
    """The kernel that the layer writes is the one that gradients update."""

    def build() -> keras.Model:
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(5))
        return keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3)])

    x, y = rows(33, 6), rows(33, 3, seed=1)
    bare, parallel = pair(build, 4, loss_on=loss_on, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, x, y, batch_size=8, epochs=2, rtol=1e-4)  # 10 power iterations


def test_layer_called_twice() -> None:
    """One layer, two updates a step: as on one device."""

    def build() -> keras.Model:
        normalise = keras.layers.BatchNormalization(momentum=0.8)
        a, b = keras.Input((6,)), keras.Input((6,))
        return keras.Model([a, b], normalise(a) + normalise(2 * b + 1))

    bare, parallel = pair(build, 4, optimizer="sgd", loss="mse")
    x = [rows(10, 6), rows(10, 6, seed=1)]
    bare(x, training=True)
    parallel(x, training=True)
    for one, other in zip(bare.variables, parallel.variables, strict=True):
        np.testing.assert_allclose(
            other.numpy(), one.numpy(), rtol=RTOL, atol=ATOL, err_msg=one.path
        )


class GlobalNoise(keras.layers.Layer):
    """Draws from Keras' global generator, which is no part of the model."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return keras.random.normal(keras.ops.shape(x))


def test_generator_outside_of_the_model() -> None:
    """N10: each tower its own stream, and the state moves on."""
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((500,)), GlobalNoise()]), 4)
    drawn = np.concatenate([parallel(np.zeros((4, 500), "float32")).numpy() for _ in range(3)])
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 0.3


def test_tower_seed() -> None:
    seed = tf.constant([1234, 5], tf.int64)
    states = [tuple(tower_seed(seed, tf.constant(tower)).numpy()) for tower in range(8)]
    assert states[0] == (1234, 5)
    assert len(set(states)) == 8
    later = [
        tuple(tower_seed(seed + tf.constant([0, 1], tf.int64), tf.constant(tower)).numpy())
        for tower in range(8)
    ]
    assert not set(states) & set(later)


def test_layers_that_come_later() -> None:
    """Variables that appear after the first pass are noticed (LoRA)."""
    dense = keras.layers.Dense(3)
    bare = keras.Sequential([keras.Input((6,)), dense])
    parallel = pk.DataParallelModel(bare, 4)
    x = rows(10, 6)
    parallel(x)
    dense.enable_lora(2)
    for variable in dense.trainable_variables:
        variable.assign(variable + 0.5)
    np.testing.assert_allclose(parallel(x), bare(x), rtol=RTOL, atol=ATOL)


def test_layers_that_are_frozen_later() -> None:
    """A frozen BatchNormalization uses its moving statistics, also without a second compile."""
    layer = keras.layers.BatchNormalization()
    bare = keras.Sequential([keras.Input((6,)), layer])
    parallel = pk.DataParallelModel(bare, 4)
    x = rows(10, 6)
    parallel(x, training=True)
    layer.trainable = False
    np.testing.assert_allclose(
        parallel(x, training=True), bare(x, training=True), rtol=RTOL, atol=ATOL
    )


def test_running_batches_of_all_sizes_keeps_state_equal() -> None:
    def build() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), Counts(), keras.layers.Dense(3)])

    sizes = [9, 1, 4, 12, 3]
    x, y = rows(sum(sizes), 6), rows(sum(sizes), 3, seed=1)
    bare, parallel = pair(build, 4, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, batches(sizes, x, y), epochs=1)


@pytest.mark.parametrize("known", [True, False])
def test_normalisation_takes_one_update_towards_the_whole_batch(known: bool) -> None:
    """3, 3, 2 and 2 rows: as the bare layer on all 10, and as NumPy."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization(momentum=0.8)])

    bare, parallel = pair(build, 4, optimizer="sgd", loss="mse")
    x = 3 * rows(10, 6) + 1
    spec = tf.TensorSpec((10 if known else None, 6))
    tf.function(lambda x: parallel(x, training=True), input_signature=[spec])(x)
    bare(x, training=True)
    layer = parallel.layers[0]
    wide = x.astype("float64")
    np.testing.assert_allclose(layer.moving_mean, 0.2 * wide.mean(0), rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(layer.moving_variance, 0.8 + 0.2 * wide.var(0), rtol=RTOL)
    for one, other in zip(bare.variables, parallel.variables, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL, err_msg=one.path)


class AssignsAgain(keras.layers.Layer):
    """Updates that come twice in a call, and one that differs from tower to tower."""

    def __init__(self) -> None:
        super().__init__()

        def variable(name: str, dtype: str, **kwargs: Any) -> keras.Variable:
            return self.add_weight(
                shape=(), initializer="zeros", dtype=dtype, trainable=False, name=name, **kwargs
            )

        self.steps = variable("steps", "int32")
        self.average = variable("average", "float32")
        self.total = variable("total", "float32", aggregation="sum")
        self.first = variable("first", "float32", aggregation="only_first_replica")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for _ in range(2):
            self.steps.assign(self.steps + 1)
            self.average.assign(0.5 * self.average + 0.5 * keras.ops.mean(x))
            self.total.assign(self.total + keras.ops.sum(x))
        self.first.assign(keras.ops.sum(x))
        return x


def test_the_last_of_several_assignments_counts() -> None:
    template = keras.Sequential([keras.Input((6,)), AssignsAgain()])
    parallel, layer, x = pk.DataParallelModel(template, 4), template.layers[0], rows(10, 6)
    parallel(x)
    assert int(layer.steps.value) == 2
    np.testing.assert_allclose(float(layer.average.value), 0.75 * x.mean(), rtol=RTOL)
    np.testing.assert_allclose(float(layer.total.value), 2 * x.sum(), rtol=RTOL)


def test_only_first_replica_is_the_first_towers() -> None:
    """The first 3 of 10 rows."""
    template = keras.Sequential([keras.Input((6,)), AssignsAgain()])
    parallel, x = pk.DataParallelModel(template, 4), rows(10, 6)
    parallel(x)
    np.testing.assert_allclose(float(template.layers[0].first.value), x[:3].sum(), rtol=RTOL)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("size", [10, 7, 8, 3])
def test_counters_without_a_graph(size: int) -> None:
    """Equal shards tell nothing: what counts rows is found out from a few, as in a graph."""
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((6,)), Counts()]), 4)
    parallel.compile("sgd", "mse", run_eagerly=True)
    parallel(rows(size, 6))
    layer = parallel.layers[0]
    assert int(layer.steps.value) == 1
    assert int(layer.rows.value) == size


def start_anew() -> None:
    """Starts Keras' global generator anew: Keras before 3.9 keeps it when a seed is set."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)


@pytest.mark.parametrize("towers", [1, 4])
def test_global_generator_advances_as_on_one_device(towers: int) -> None:
    """And the first tower draws what the bare model draws."""
    template, x = keras.Sequential([keras.Input((6,)), GlobalNoise()]), rows(10, 6)
    start_anew()
    first, second = template(x).numpy(), template(x).numpy()
    start_anew()
    parallel = pk.DataParallelModel(template, towers)
    drawn = parallel(x).numpy()
    count = 10 if towers == 1 else 3
    # A stateless draw of fewer rows begins with the same numbers.
    np.testing.assert_array_equal(drawn[:count], first[:count])
    np.testing.assert_array_equal(template(x), second)
    assert len(np.unique(drawn)) == drawn.size


class OnlyCountsRows(keras.layers.Layer):
    """Has no state but an integer, so that nothing else tells that it needs the size."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.add_weight(
            shape=(), initializer="zeros", dtype="int32", trainable=False, name="rows"
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.rows.assign(self.rows + keras.ops.shape(x)[0])
        return x


@pytest.mark.parametrize("size", [8, 10])
def test_a_lone_counter_of_rows_of_known_size(size: int) -> None:
    """A known size is a plain number while tracing, as a step is."""
    template = keras.Sequential([keras.Input((6,)), OnlyCountsRows()])
    parallel = pk.DataParallelModel(template, 4)
    spec = tf.TensorSpec((size, 6))
    tf.function(parallel, input_signature=[spec])(tf.constant(rows(size, 6)))
    assert int(template.layers[0].rows.value) == size


class ComplexMean(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.mean = self.add_weight(
            shape=(), initializer="zeros", dtype="complex64", trainable=False, autocast=False
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.mean.assign(tf.cast(tf.reduce_mean(x), "complex64") * (1 + 2j))
        return x


def test_complex_state_is_a_mean_by_rows() -> None:
    template = keras.Sequential([keras.Input((6,)), ComplexMean()])
    x = rows(10, 6)
    pk.DataParallelModel(template, 4)(x)
    np.testing.assert_allclose(
        template.layers[0].mean.value, x.mean() * (1 + 2j), rtol=RTOL, atol=ATOL
    )
