"""Every optimizer, mixed precision and frozen weights beside one device."""

import inspect
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.parity import (
    assert_same_fit,
    assert_same_variables,
    mlp,
    pair,
    rng,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


def _optimizer(name: str) -> Any:
    return lambda: getattr(keras.optimizers, name)(0.01)


# All that this version of Keras has, without those that wrap others.
WRAPPERS = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
OPTIMIZERS = {
    **{
        name: _optimizer(name)
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in WRAPPERS
    },
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
    "accumulate": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    ),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "fixed loss scale": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
}  # fmt: skip


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """C10: https://github.com/tensorflow/tensorflow/issues/32960."""
    x, y = rows(33, 6), rows(33, 3, seed=1)
    loss_on = "towers" if len(name) % 2 else "merged"
    bare, parallel = pair(mlp, 4, loss_on=loss_on, loss="mse", optimizer=OPTIMIZERS[name])
    assert_same_fit(bare, parallel, x, y, batch_size=8, epochs=4)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy: str, loss_on: str) -> None:
    """Half precision rounds sums of other groups of rows otherwise: 3 digits are all there are."""
    x, y = rows(33, 6), rows(33, 3, seed=1)

    def build() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(7, activation="tanh", dtype=policy),
                keras.layers.Dense(3, dtype=policy),
            ]
        )

    def half() -> keras.Model:
        model = build()
        model.dtype_policy = keras.dtype_policies.get(policy)
        return model

    bare, parallel = pair(half, 4, loss_on=loss_on, loss="mse", **SGD)
    assert isinstance(parallel.optimizer, type(bare.optimizer))
    assert isinstance(bare.optimizer, keras.optimizers.LossScaleOptimizer) == (
        policy == "mixed_float16"
    )
    for model in (bare, parallel):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    tolerance = 2e-3 if policy == "mixed_float16" else 2e-2
    for one, other in zip(bare.weights, parallel.weights, strict=True):
        assert one.dtype == other.dtype == "float32"
        np.testing.assert_allclose(other.numpy(), one.numpy(), atol=tolerance)
    assert parallel(x).dtype == bare(x).dtype


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_overflow_on_one_tower_skips_the_step(loss_on: str) -> None:
    x, y = rows(8, 6), rows(8, 3, seed=1)
    x_bad = x.copy()
    x_bad[5] = np.inf
    bare, parallel = pair(
        mlp, 4, loss_on=loss_on, loss="mse",
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    )  # fmt: skip
    for model in (bare, parallel):
        model.train_on_batch(x, y)
    before = parallel.get_weights()
    for model in (bare, parallel):
        model.train_on_batch(x_bad, y)
    for old, new in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(parallel.optimizer.dynamic_scale.value) == float(
        bare.optimizer.dynamic_scale.value
    )
    for model in (bare, parallel):
        model.train_on_batch(x, y)
    assert_same_variables(bare, parallel)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_frozen_layers_stay_bit_equal(loss_on: str) -> None:
    """C4: https://github.com/keras-team/keras/issues/9198."""
    x, y = rows(10, 6), rows(10, 3, seed=1)

    def build() -> keras.Model:
        model = mlp()
        model.layers[0].trainable = False
        return model

    bare, parallel = pair(build, 4, loss_on=loss_on, loss="mse", **SGD)
    frozen = [weight.numpy() for weight in parallel.template.layers[0].weights]
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    for old, weight in zip(frozen, parallel.template.layers[0].weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    for model in (bare, parallel):
        model.layers[0].trainable = True
        model.layers[1].trainable = False
        model.compile(keras.optimizers.SGD(0.05), "mse")
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    assert not np.array_equal(parallel.template.layers[0].weights[0].numpy(), frozen[0])


def test_embedding_gradients_stay_sparse() -> None:
    """P4: https://github.com/tensorflow/tensorflow/issues/53160."""
    x, y = rng().integers(0, 50, (10, 4)), rows(10, 4, 3, seed=1)

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((4,)), keras.layers.Embedding(50, 3)])

    for loss_on in ("merged", "towers"):
        seen: list[Any] = []

        class Watching(keras.optimizers.SGD):
            def apply_gradients(self, pairs: Any) -> Any:
                pairs = list(pairs)
                seen.extend(type(gradient) for gradient, _ in pairs)  # noqa: B023
                return super().apply_gradients(pairs)

        bare, parallel = pair(
            build, 3, loss_on=loss_on, loss="mse", optimizer=lambda: Watching(0.1)
        )
        assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
        assert set(seen) == {tf.IndexedSlices}
