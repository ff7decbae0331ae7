"""Code of a model that looks for variables, or keeps traces of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, assert_same_variables, batches, pair, rows
from tests.versions import needs, since

SIZES = [7, 2, 3]  # uneven, and fewer rows than towers


def data() -> tf.data.Dataset:
    return batches(SIZES, rows(12, 6), rows(12, 3, seed=1))


def sequential(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])


class Mapped(keras.layers.Layer):
    """A layer whose `call` takes no keyword: Keras' `Dense` takes `training`, which fails there."""

    def __init__(self, units: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.units = units

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units))
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return keras.ops.tanh(keras.ops.matmul(x, self.kernel) + self.bias)


class Again(keras.layers.Layer):
    """Another layer, in training, that is computed again on the way back."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__()
        self.layer = layer
        self.work = keras.remat(lambda x: self.layer(x, training=True))

    def build(self, shape: Any) -> None:
        self.layer.build(shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.work(x)


def with_remat_scope() -> keras.Model:
    with keras.RematScope("full"):
        layers = [Mapped(5), keras.layers.LayerNormalization()]
    return sequential(*layers)


def with_remat_of_some() -> keras.Model:
    with keras.RematScope("list_of_layers", layer_names=["remade"]):
        layers = [Mapped(5, name="remade"), Mapped(4)]
    return sequential(*layers)


class Wrapped(keras.layers.Layer):
    """A layer whose work is done by a function that looks for variables."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(5, "tanh")
        self.wrapped = wrap(self.work)

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(5,), initializer="ones")

    def work(self, x: tf.Tensor) -> tf.Tensor:
        return self.inner(x) * self.scale

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.wrapped(x)


class Custom(keras.layers.Layer):
    """A custom gradient that is half of the true one, so that it is seen whether it is used."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 4))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def halved(x: tf.Tensor) -> Any:
            def back(up: tf.Tensor, variables: Any = None) -> Any:
                left = 0.5 * tf.matmul(up, self.kernel, transpose_b=True)
                return left, [0.5 * tf.matmul(x, up, transpose_a=True) for _ in variables]

            return tf.matmul(x, self.kernel), back

        return halved(x)


class InALoop(keras.layers.Layer):
    """Reads a weight in a loop, under a custom gradient."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def twice(x: tf.Tensor) -> tf.Tensor:
            return tf.while_loop(
                lambda i, _: i < 2, lambda i, y: (i + 1, tf.tanh(y * self.scale)), [0, x]
            )[1]

        return tf.recompute_grad(twice)(x)


def with_recompute() -> keras.Model:
    return sequential(Wrapped(tf.recompute_grad))


def with_keras_remat() -> keras.Model:
    return sequential(Wrapped(keras.remat))


def with_custom_gradient() -> keras.Model:
    return sequential(Custom())


def with_loop() -> keras.Model:
    return sequential(InALoop())


LOOKING = [
    pytest.param(with_remat_scope, "merged", marks=needs("RematScope")),
    pytest.param(with_remat_scope, "towers", marks=needs("RematScope")),
    pytest.param(with_remat_of_some, "towers", marks=needs("RematScope")),
    (with_recompute, "merged"),
    pytest.param(with_keras_remat, "towers", marks=needs("remat")),
    (with_custom_gradient, "merged"),
    (with_loop, "towers"),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("build", "loss_on"), LOOKING)
def test_custom_gradients_find_weights(build: Callable[[], keras.Model], loss_on: str) -> None:
    """X5: a gradient that looks for variables found tensors, and trained none."""
    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    before = [weight.numpy() for weight in bare.trainable_variables]
    assert_same_fit(bare, parallel, data(), epochs=2)
    for weight, old in zip(bare.trainable_variables, before, strict=True):
        assert np.abs(weight.numpy() - old).max() > 1e-4
    assert_same_fit(bare, parallel, data())
    np.testing.assert_allclose(
        parallel.predict(rows(7, 6), verbose=0), bare.predict(rows(7, 6), verbose=0), RTOL, ATOL
    )


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        pytest.param(with_remat_scope, {"run_eagerly": True}, marks=needs("RematScope")),
        (with_custom_gradient, {"jit_compile": True}),
    ],
)
def test_custom_gradients_find_weights_also_so(
    build: Callable[[], keras.Model], arguments: dict[str, bool]
) -> None:
    """X5: where towers are not traced, and where XLA compiles them."""
    bare, parallel = pair(build, 3, optimizer="adam", loss="mse", **arguments)
    bare.jit_compile = False
    assert_same_fit(bare, parallel, data())


@needs("RematScope")
def test_custom_gradients_find_weights_on_one_tower() -> None:
    """X5: one device is no exception."""
    bare, parallel = pair(with_remat_scope, 1, optimizer="adam", loss="mse")
    assert_same_fit(bare, parallel, data(), epochs=2)


class Steps(keras.Model):
    """A step of its own around another model."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.model(x)

    def train_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


@needs("RematScope")
def test_custom_gradients_find_weights_in_steps_of_the_template() -> None:
    """X5: each call of a step is a custom gradient itself."""
    bare, parallel = pair(lambda: Steps(with_remat_scope()), 3, optimizer="sgd")
    assert_same_fit(bare, parallel, data())


class Counts(keras.layers.Layer):
    calls = 0

    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.calls += 1
        return x


def test_custom_gradients_of_keras_itself_cost_nothing() -> None:
    """X5: `silu` is a custom gradient that uses no weight."""
    calls = []
    for activation in ("relu", "silu"):
        layer = Counts()
        parallel = pk.DataParallelModel(sequential(keras.layers.Dense(4, activation), layer), 3)
        parallel.compile("sgd", "mse")
        parallel.fit(rows(6, 6), rows(6, 3), verbose=0)
        calls.append(layer.calls)
    assert calls[0] == calls[1]


class Function(keras.layers.Layer):
    """Dropout and normalisation in a function that keeps its traces."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(5, "tanh")
        self.norm = keras.layers.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.norm.build((None, 5))

    @tf.function
    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.inner(x) + 0 * self.norm(self.inner(x), training=training)


class Helper(keras.layers.Layer):
    """A helper that reads a weight, and needs AutoGraph."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 5))

    @tf.function
    def helper(self, x: tf.Tensor) -> tf.Tensor:
        if tf.reduce_sum(x) < 1e6:
            y = tf.matmul(x, self.kernel)
        else:
            y = tf.zeros([tf.shape(x)[0], 5])
        return tf.ensure_shape(y, [None, 5])

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.helper(x)


@tf.function
def scaled(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    return tf.matmul(x, kernel)


class Shared(keras.layers.Layer):
    """A function of a module, kept by no layer."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 5))
        self.function = {"one": tf.function(lambda x: tf.nn.relu(x) * tf.reduce_mean(self.kernel))}

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.function["one"](scaled(x, tf.convert_to_tensor(self.kernel)))


class Compiled(keras.layers.Layer):
    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 5))

    @tf.function(jit_compile=True)
    def helper(self, x: tf.Tensor) -> tf.Tensor:
        return tf.matmul(x, self.kernel)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.helper(x)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("layer", "loss_on", "called"),
    [
        (Function, "merged", True),
        (Function, "towers", False),
        (Helper, "towers", True),
        (Shared, "merged", False),
        (Compiled, "towers", True),
    ],
)
def test_functions_inside_keep_no_trace_of_a_tower(layer: Any, loss_on: str, called: bool) -> None:
    """X5: a `tf.function` in a model, which was called before or not."""
    bare, parallel = pair(
        lambda: sequential(layer()), 3, loss_on=loss_on, optimizer="adam", loss="mse"
    )
    x = rows(7, 6)
    if called:
        bare.predict(x, verbose=0)
        parallel.template.predict(x, verbose=0)
    for _ in range(2):
        assert_same_fit(bare, parallel, data())
        expected = bare.predict(x, verbose=0)
        np.testing.assert_allclose(parallel.predict(x, verbose=0), expected, RTOL, ATOL)
        np.testing.assert_allclose(parallel(x), expected, RTOL, ATOL)
        np.testing.assert_allclose(parallel.template.predict(x, verbose=0), expected, RTOL, ATOL)


def test_functions_inside_of_towers_that_are_not_traced() -> None:
    """X5: what one tower traced, the next must not use."""
    bare, parallel = pair(
        lambda: sequential(Function()), 3, optimizer="adam", loss="mse", run_eagerly=True
    )
    assert_same_fit(bare, parallel, data())


class Concrete(keras.layers.Layer):
    """A trace that the user made, of which there is no other."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 5))
        function = tf.function(lambda x: tf.matmul(x, self.kernel))
        self.trace = function.get_concrete_function(tf.TensorSpec((None, shape[-1])))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.trace(x)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_traces_of_the_user_are_trained(loss_on: str) -> None:
    """X5: a trace reads the variable itself."""
    bare, parallel = pair(
        lambda: sequential(Concrete()), 3, loss_on=loss_on, optimizer="adam", loss="mse"
    )
    assert_same_fit(bare, parallel, data(), epochs=2)


@pytest.mark.sweep(1)
@since("3.9", "a TFSMLayer that is trained fails, on one device too")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_saved_models_are_trained(loss_on: str, tmp_path: Path) -> None:
    """X5: `TFSMLayer` holds functions that read its weights as variables."""
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "tanh")])
    archive = keras.export.ExportArchive()
    archive.track(inner)
    for name, training in (("serve", False), ("train", True)):
        archive.add_endpoint(
            name,
            lambda x, training=training: inner(x, training=training),
            [tf.TensorSpec((None, 6))],
        )
    archive.write_out(str(tmp_path), verbose=False)

    def build() -> keras.Model:
        return sequential(
            keras.layers.TFSMLayer(
                str(tmp_path), call_endpoint="serve", call_training_endpoint="train"
            )
        )

    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    assert len(bare.trainable_variables) == 4
    assert_same_fit(bare, parallel, data(), epochs=2)
    assert_same_variables(bare, parallel)


def test_xla_leaves_traces_of_the_user_alone(caplog: pytest.LogCaptureFixture) -> None:
    """X5: said in the log."""
    bare, parallel = pair(lambda: sequential(Concrete()), 3, optimizer="adam", loss="mse")
    parallel.compile("adam", "mse", jit_compile=True)
    with caplog.at_level("WARNING"):
        assert_same_fit(bare, parallel, data())
    assert "are not compiled by XLA" in caplog.text


def with_state() -> keras.Model:
    return sequential(Mapped(5), Again(keras.layers.BatchNormalization(synchronized=True)))


def with_dropout() -> keras.Model:
    return sequential(Mapped(5), Again(keras.layers.Dropout(0.5, seed=1)))


@needs("remat")
def test_state_of_layers_that_are_computed_again() -> None:
    """X5: one device updates moving statistics twice, and so do towers."""
    bare, parallel = pair(with_state, 3, loss_on="towers", optimizer="sgd", loss="mse")
    x, y = rows(14, 6), rows(14, 3, seed=1)
    assert_same_fit(bare, parallel, batches([7, 7], x, y), rtol=1e-4)


@needs("remat")
def test_state_of_layers_that_are_computed_again_after_the_merge() -> None:
    """X5: refused in words."""
    _, parallel = pair(with_state, 3, loss_on="merged", optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"moving_mean' is assigned by a layer.*loss_on=.towers."):
        parallel.fit(data(), verbose=0, shuffle=False)


@needs("remat")
def test_random_layers_that_are_computed_again() -> None:
    """X5: they train; what they draw is their own."""
    _, parallel = pair(with_dropout, 3, loss_on="merged", optimizer="sgd", loss="mse")
    before = [weight.numpy() for weight in parallel.trainable_variables]
    parallel.fit(data(), verbose=0, shuffle=False)
    for weight, old in zip(parallel.trainable_variables, before, strict=True):
        assert np.abs(weight.numpy() - old).max() > 1e-4
