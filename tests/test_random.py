"""Random layers and BatchNormalization: what is exact and what is not."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, batches, pair, rows


def dropout() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.Dropout(0.5, seed=5),
            keras.layers.GaussianNoise(0.1, seed=6),
            keras.layers.Dense(3),
        ]
    )


def test_runs_repeat() -> None:
    """N10: https://github.com/keras-team/keras/issues/20611."""
    x, y = rows(33, 6), rows(33, 3, seed=1)
    results = []
    for _ in range(2):
        _, parallel = pair(dropout, 4, optimizer="sgd", loss="mse")
        keras.utils.set_random_seed(3)
        history = parallel.fit(x, y, batch_size=8, epochs=2, verbose=0).history
        results.append([history["loss"], *(weight.numpy() for weight in parallel.variables)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_towers_draw_different_masks_and_states_advance_as_on_one_device() -> None:
    layer = keras.layers.Dropout(0.5, seed=5)
    model = keras.Sequential([keras.Input((1000,)), layer])
    single = keras.Sequential([keras.Input((1000,)), keras.layers.Dropout(0.5, seed=5)])
    parallel = pk.DataParallelModel(model, 4)
    seen = []
    for _ in range(3):
        masks = parallel(np.ones((4, 1000), "float32"), training=True).numpy() > 0
        alone = single(np.ones((4, 1000), "float32"), training=True).numpy() > 0
        seen.extend(masks)
        np.testing.assert_array_equal(
            layer.seed_generator.state.numpy(), single.layers[0].seed_generator.state.numpy()
        )
        assert 0.4 < masks.mean() < 0.6
        np.testing.assert_array_equal(masks[0], alone[0])  # the first tower draws as the template
    for index, one in enumerate(seen):
        for other in seen[:index]:
            assert 0.4 < (one == other).mean() < 0.6


def normalised(synchronized: bool) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(7, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9, synchronized=synchronized),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(5, use_bias=False),
            keras.layers.BatchNormalization(synchronized=synchronized),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("towers", [2, 3, 8])
def test_synchronized_normalisation_is_exact(towers: int, loss_on: str) -> None:
    """N5: https://github.com/tensorflow/tensorflow/issues/18222."""
    sizes = [10, 7, 3, 1, 8, 2]  # uneven, and fewer rows than towers
    x, y = rows(sum(sizes), 6), rows(sum(sizes), 3, seed=1)
    bare, parallel = pair(
        lambda: normalised(True), towers, loss_on=loss_on,
        optimizer=lambda: keras.optimizers.SGD(0.05, momentum=0.9), loss="mse",
    )  # fmt: skip
    # Keras computes synchronised variances as E(x^2) - E(x)^2, also on one device, which
    # cancels digits: where a batch has 1 row the variance is nothing but rounding.
    assert_same_fit(bare, parallel, batches(sizes, x, y), epochs=2, rtol=1e-4)


def test_synchronized_normalisation_of_known_size() -> None:
    bare, parallel = pair(lambda: normalised(True), 3, optimizer="sgd", loss="mse")
    x = tf.constant(rows(10, 6))  # 4, 3 and 3 rows: two traces of the tower
    np.testing.assert_allclose(
        parallel(x, training=True), bare(x, training=True), rtol=RTOL, atol=ATOL * 10
    )
    for one, other in zip(bare.variables, parallel.variables, strict=True):
        np.testing.assert_allclose(
            other.numpy(), one.numpy(), rtol=RTOL, atol=ATOL, err_msg=one.path
        )


@pytest.mark.sweep(2)
@pytest.mark.parametrize("size", [10, 7, 3, 1])
def test_default_normalisation_keeps_the_statistics_of_the_whole_batch(size: int) -> None:
    """N5: one momentum update a step, https://github.com/pytorch/pytorch/issues/1051."""
    for known in (True, False):
        bare, parallel = pair(lambda: normalised(False), 4, optimizer="sgd", loss="mse")
        x = rows(size, 6)
        bare(x, training=True)
        spec = tf.TensorSpec((size if known else None, 6))
        tf.function(lambda x: parallel(x, training=True), input_signature=[spec])(tf.constant(x))  # noqa: B023
        # The second layer's input is already normalised by shard, so only the first is compared.
        first, expected = parallel.template.layers[1], bare.layers[1]
        for name in ("moving_mean", "moving_variance"):
            np.testing.assert_allclose(
                getattr(first, name).numpy(), getattr(expected, name).numpy(), rtol=RTOL, atol=ATOL
            )


def test_default_normalisation_is_by_shard() -> None:
    """The documented exception: each tower's rows are normalised by themselves."""
    layer = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6,)), layer])
    x = rows(10, 6)
    output = pk.DataParallelModel(model, 4)(x, training=True).numpy()
    starts = [0, 3, 6, 8, 10]
    for start, stop in itertools.pairwise(starts):
        np.testing.assert_allclose(output[start:stop].mean(axis=0), 0, atol=1e-5)
