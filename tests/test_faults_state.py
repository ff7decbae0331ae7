"""State that is assigned in loops and conditions, or kept outside of Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, batches, pair, rows

SIZES = [7, 2, 3]  # uneven, and fewer rows than towers


class Cell(keras.layers.Layer):
    """A cell of an RNN with another layer in it, and a counter."""

    def __init__(self, inner: keras.layers.Layer) -> None:
        super().__init__()
        self.state_size = 4
        self.dense = keras.layers.Dense(4, "tanh")
        self.inner = inner

    def build(self, shape: Any) -> None:
        self.dense.build((None, shape[-1] + 4))
        self.inner.build((None, 4))
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.mean = self.add_weight(shape=(4,), initializer="zeros", trainable=False)

    def call(self, x: tf.Tensor, states: Any, training: bool = False) -> Any:
        self.calls.assign_add(1)
        h = self.dense(keras.ops.concatenate([x, states[0]], axis=-1))
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(h, axis=0))
        h = self.inner(h, training=training)
        return h, [h]


def recurrent(inner: keras.layers.Layer) -> keras.Model:
    return keras.Sequential(
        [keras.Input((5, 3)), keras.layers.RNN(Cell(inner)), keras.layers.Dense(2)]
    )


def sequences() -> tf.data.Dataset:
    return batches(SIZES, rows(12, 5, 3), rows(12, 2, seed=1))


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("loss_on", "arguments"),
    [
        ("merged", {}),
        ("towers", {}),
        ("auto", {"jit_compile": True}),
        ("auto", {"run_eagerly": True}),
    ],
)
def test_state_is_assigned_in_a_cell(loss_on: str, arguments: dict[str, bool]) -> None:
    """X14: the value was a tensor of the loop's graph."""
    build = lambda: recurrent(keras.layers.LayerNormalization())  # noqa: E731
    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse", **arguments)
    bare.jit_compile = False
    for _ in range(2):
        assert_same_fit(bare, parallel, sequences(), epochs=2)
    assert int(bare.layers[0].cell.calls.numpy()) >= 5 * 3 * 4
    x = rows(7, 5, 3)
    np.testing.assert_allclose(
        parallel.predict(x, verbose=0), bare.predict(x, verbose=0), RTOL, ATOL
    )


def test_state_is_assigned_in_a_cell_on_one_tower() -> None:
    """X14: one device is no exception."""
    build = lambda: recurrent(keras.layers.BatchNormalization())  # noqa: E731
    bare, parallel = pair(build, 1, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, sequences(), epochs=2)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dropout(0.5, seed=1),
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.BatchNormalization(),
        lambda: keras.layers.SpectralNormalization(keras.layers.Dense(4)),
    ],
)
def test_layers_of_keras_in_a_cell(make: Any) -> None:
    """X14: they train and predict; the state of seeds advances as on one device."""
    bare, parallel = pair(lambda: recurrent(make()), 3, optimizer="sgd", loss="mse")
    for model in (bare, parallel):
        model.fit(sequences(), epochs=2, verbose=0, shuffle=False)
    for one, other in zip(bare.variables, parallel.template.variables, strict=True):
        if not keras.backend.is_float_dtype(one.dtype):
            np.testing.assert_array_equal(other.numpy(), one.numpy(), one.path)
    assert np.isfinite(parallel.predict(rows(7, 5, 3), verbose=0)).all()


def test_towers_draw_their_own_in_a_cell() -> None:
    """X14: different towers, different masks."""

    class Draws(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.drop = keras.layers.Dropout(0.5, seed=4)
            self.drop.build(shape)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            step = lambda i, y: (i + 1, self.drop(y, training=True))  # noqa: E731
            return tf.while_loop(lambda i, _: i < 1, step, [0, x])[1]

    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((64,)), Draws()]), 3)
    drawn = parallel.predict(np.ones((6, 64), "float32"), batch_size=6, verbose=0)
    assert len(np.unique(drawn, axis=0)) == 6


class ActNorm(keras.layers.Layer):
    """Takes its first values from the first batch, and counts batches and rows."""

    def build(self, shape: Any) -> None:
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros")
        self.steps = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.seen = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def first() -> tf.Tensor:
            self.shift.assign(-tf.reduce_mean(x, axis=0))
            self.seen.assign_add(tf.shape(x)[0])
            return tf.constant(0)

        tf.cond(self.steps < 1, first, lambda: tf.constant(0))
        self.steps.assign_add(1)
        return x + self.shift


class Net(keras.Model):
    """Not built, and of a shape that Keras cannot find out without a step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ActNorm()
        self.dense = keras.layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(self.norm(x))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_state_is_assigned_in_a_condition(loss_on: str) -> None:
    """X14: also of what is trained, and of a model that is not built."""
    bare, parallel = pair(Net, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    for model in (bare, parallel):
        keras.utils.set_random_seed(0)
        model.fit(batches([7], rows(7, 4), rows(7, 2)), verbose=0, shuffle=False)
        model.fit(batches([7, 2], rows(9, 4), rows(9, 2)), verbose=0, shuffle=False)
    # Each tower's rows were shifted by their own mean in the first step: values differ from then.
    for net in (bare, parallel.template):
        assert int(net.norm.steps.numpy()) == 3
        assert int(net.norm.seen.numpy()) == 7


class Loops(keras.layers.Layer):
    """Assigns in the loops and conditions of `keras.ops`."""

    def build(self, shape: Any) -> None:
        self.n = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False)

    # Keras cannot find it out by itself, for the reason that the wrapper could not.
    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, y: tf.Tensor) -> Any:
            self.n.assign_add(1)
            return i + 1, y * 1.5

        _, x = keras.ops.while_loop(lambda i, _: i < 3, body, (0, x))

        def step(carry: tf.Tensor, row: tf.Tensor) -> Any:
            self.total.assign_add(1.0)
            return carry + row, carry

        keras.ops.scan(step, keras.ops.zeros(()), keras.ops.arange(4, dtype="float32"))
        keras.ops.cond(self.n > 0, lambda: self.n.assign_add(10), lambda: self.n.assign_add(0))
        return x


def test_state_is_assigned_in_loops_of_keras() -> None:
    """X14: counters of steps count as on one device."""
    build = lambda: keras.Sequential([keras.Input((4,)), Loops(), keras.layers.Dense(2)])  # noqa: E731
    bare, parallel = pair(build, 3, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, batches(SIZES, rows(12, 4), rows(12, 2, seed=1)))


class Keeps(keras.layers.Layer):
    """Something that Keras does not know, which each call changes."""

    def __init__(self, kept: Any, change: Any) -> None:
        super().__init__()
        self.kept = kept
        self.change = change

    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.change(self.kept, x)
        return x * 1.0


def table() -> Any:
    return tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)


def count_if(kept: tf.Variable, x: tf.Tensor) -> None:
    tf.cond(tf.shape(x)[0] > 0, lambda: kept.assign_add(1.0), lambda: kept.read_value())


@tf.function
def count_inside(kept: tf.Variable, x: tf.Tensor) -> None:
    kept.assign_add(tf.cast(tf.shape(x)[0], tf.float32))


KEPT = [
    (lambda: tf.Variable(0), lambda n, x: n.assign_add(1), "'kept'"),
    (lambda: [tf.Variable(0.0)], lambda n, x: n[0].assign(tf.reduce_sum(x)), "'kept.0'"),
    (lambda: {"a": tf.Variable([0.0])}, lambda n, x: n["a"][0].assign(1.0), "'kept.a'"),
    (lambda: tf.Variable(0.0), count_if, "'kept'"),
    (lambda: tf.Variable(0.0), count_inside, "'kept'"),
    (lambda: tf.Variable([0.0]), lambda n, x: n.scatter_nd_add([[0]], [1.0]), "'kept'"),
    (lambda: tf.random.Generator.from_seed(1), lambda g, x: g.normal([2]), "'kept._state_var'"),
    (table, lambda t, x: t.insert(tf.constant([1], tf.int64), [1.0]), "changes a table: 'kept'"),
]


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("make", "change", "name"), KEPT)
def test_state_outside_of_keras_is_refused(make: Any, change: Any, name: str) -> None:
    """X6: each tower would change it, where one device does it once."""
    template = keras.Sequential([keras.Input((4,)), Keeps(make(), change), keras.layers.Dense(1)])
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("sgd", "mse")
    for call in (
        lambda: parallel.fit(rows(7, 4), rows(7, 1), verbose=0),
        lambda: parallel.predict(rows(7, 4), verbose=0),
        lambda: parallel(rows(7, 4)),
    ):
        with pytest.raises(ValueError, match=f"{name} of layer 'keeps.*devices=1"):
            call()


def test_the_generator_of_everybody_is_refused_by_name() -> None:
    """X6: no layer has it."""
    layer = Keeps(None, lambda n, x: tf.random.get_global_generator().normal([2]))
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((4,)), layer]), 3)
    with pytest.raises(ValueError, match=r"assigns to the generator of tf\.random\.get_global_gen"):
        parallel.predict(rows(7, 4), verbose=0)


def test_state_outside_of_keras_is_refused_without_a_graph() -> None:
    """X6: there the value tells."""
    template = keras.Sequential(
        [keras.Input((4,)), Keeps(tf.Variable(0), lambda n, x: n.assign_add(1))]
    )
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"'kept' of layer 'keeps.*devices=1"):
        parallel.predict(rows(7, 4), verbose=0)


SEEN = {"everywhere": [tf.Variable(0)]}


def count_everywhere(kept: Any, x: tf.Tensor) -> None:
    SEEN["everywhere"][0].assign_add(tf.shape(x)[0])


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("of_module", [False, True])
def test_state_that_no_layer_has_is_refused(of_module: bool, eager: bool) -> None:
    """X6: it is found by the code that uses it."""
    own = tf.Variable(0)
    change, name = (count_everywhere, "SEEN") if of_module else (lambda n, x: own.assign(1), "own")
    template = keras.Sequential([keras.Input((4,)), Keeps(None, change)])
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("sgd", "mse", run_eagerly=eager)
    with pytest.raises(ValueError, match=f"'{name}.*' of layer 'keeps.*devices=1"):
        parallel.predict(rows(7, 4), verbose=0)


def test_state_outside_of_keras_is_kept_on_one_tower() -> None:
    """X6: one device does it once."""
    layer = Keeps(tf.Variable(0), lambda n, x: n.assign_add(1))
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((4,)), layer]), 1)
    before = int(layer.kept.numpy())
    parallel.predict(rows(7, 4), batch_size=4, verbose=0)
    assert int(layer.kept.numpy()) == before + 2


class Raw(keras.layers.Layer):
    """A weight that Keras does not know: it is read, and not trained by `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable(2.0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.scale


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_variables_outside_of_keras_are_read(loss_on: str) -> None:
    """X6: Keras does not train them either."""
    build = lambda: keras.Sequential([keras.Input((4,)), Raw(), keras.layers.Dense(2)])  # noqa: E731
    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, batches(SIZES, rows(12, 4), rows(12, 2, seed=1)))
    assert float(parallel.template.layers[0].scale) == 2


class TrainsRaw(keras.Model):
    """A step that trains one."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = Raw()
        self.dense = keras.layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(self.raw(x))

    def train_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        weights = self.trainable_variables
        *gradients, own = tape.gradient(loss, [*weights, self.raw.scale])
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.raw.scale.assign_sub(0.1 * own)
        return {"loss": loss}


def test_variables_outside_of_keras_are_trained_by_steps_that_do_so() -> None:
    """X6: their gradient was None."""

    def build() -> keras.Model:
        model = TrainsRaw()
        model(rows(2, 4))
        return model

    bare, parallel = pair(build, 3, optimizer="sgd")
    assert_same_fit(bare, parallel, batches(SIZES, rows(12, 4), rows(12, 2, seed=1)), epochs=2)
    moved = float(bare.raw.scale)
    assert abs(moved - 2) > 1e-3
    np.testing.assert_allclose(float(parallel.template.raw.scale), moved, RTOL)
