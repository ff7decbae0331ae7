"""Gradients reach the optimizer as they do on one device, sparse ones too."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import slices
from parallel_keras.graphs import sparse
from tests.parity import assert_same_fit, batches, pair, rng, rows

WORDS, STEPS, WIDTH = 9, 5, 3
Optimizer = Callable[[], keras.optimizers.Optimizer]
# Those that do more with a gradient than to add it up.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.01),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.001),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


class LooksUp(keras.layers.Layer):
    """Adds rows of a table to its inputs `(batch, steps, WIDTH)`, found in one of these ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = keras.layers.Embedding(2 * WORDS, WIDTH)

    def build(self, shape: Any) -> None:
        self.table.build(shape)

    def call(self, x: Any) -> Any:  # noqa: PLR0911 (a line for each way)
        count, steps = (keras.ops.shape(x)[axis] for axis in range(2))
        words = keras.ops.cast(keras.ops.abs(x[:, :, 0]) * 4, "int32") % WORDS
        if self.how == "positions":
            return x + self.table(keras.ops.arange(steps))
        if self.how == "positions of each row":
            every = keras.ops.broadcast_to(keras.ops.arange(steps), (count, steps))
            return x + self.table(every)
        if self.how == "one token":
            return x + self.table(keras.ops.zeros((1,), "int32"))
        if self.how == "relative positions":
            index = keras.ops.arange(steps)[:, None] - keras.ops.arange(steps)[None] + steps
            return x + keras.ops.matmul(keras.ops.sum(self.table(index), axis=2), x) * 0.1
        if self.how == "words and positions":
            return x + self.table(words) + self.table(WORDS + keras.ops.arange(steps))
        if self.how == "positions and words":
            return x * self.table(WORDS + keras.ops.arange(steps)) + self.table(words)
        if self.how == "words":
            return x + self.table(words)
        if self.how == "unique words":
            found, place = tf.unique(tf.reshape(words, [-1]))
            return x + keras.ops.reshape(tf.gather(self.table(found), place), keras.ops.shape(x))
        if self.how == "parts by numpy's rules":
            return x + keras.ops.take(self.table.embeddings, [-1, 3, 3, 0, 1][: x.shape[1]], axis=0)
        raise AssertionError(self.how)


WAYS = (
    "positions",
    "positions of each row",
    "one token",
    "relative positions",
    "words and positions",
    "positions and words",
    "words",
    "unique words",
    "parts by numpy's rules",
)


def looking_up(how: str, steps: int | None = STEPS) -> keras.Model:
    inputs = keras.Input((steps, WIDTH))
    x = keras.layers.Dense(WIDTH, activation="tanh")(LooksUp(how)(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(x)))


def counted(dataset_of: tuple[int, ...], steps: int = STEPS) -> tf.data.Dataset:
    total = sum(dataset_of)
    return batches(dataset_of, rows(total, steps, WIDTH), rows(total, 2, seed=1))


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("optimizer", "loss_on"),
    [*((name, "towers") for name in OPTIMIZERS), ("adam", "merged"), ("clipnorm", "merged")],
)
def test_position_tables(optimizer: str, loss_on: str) -> None:
    """X1: a row that occurs once on one device is one row for the optimizer, not one a tower."""
    bare, parallel = pair(
        lambda: looking_up("positions"), 3, loss_on=loss_on, loss="mse",
        optimizer=OPTIMIZERS[optimizer],
    )  # fmt: skip
    x, y = rows(13, STEPS, WIDTH), rows(13, 2, seed=1)
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("loss_on", "unknown"), [("merged", False), ("towers", True)])
@pytest.mark.parametrize("how", WAYS)
def test_ways_to_look_up(how: str, loss_on: str, unknown: bool) -> None:
    """X1: whatever the rows are looked up by, batches of unknown size, and small ones."""
    bare, parallel = pair(
        lambda: looking_up(how), 3, loss_on=loss_on, loss="mse",
        optimizer=lambda: keras.optimizers.Adam(0.01, clipnorm=0.1),
    )  # fmt: skip
    if unknown:
        assert_same_fit(bare, parallel, counted((6, 1, 7, 2, 5)), epochs=2)
    else:
        x, y = rows(14, STEPS, WIDTH), rows(14, 2, seed=1)
        assert_same_fit(bare, parallel, x, y, batch_size=6, epochs=2)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("how", ["positions", "positions of each row", "relative positions"])
def test_sequences_of_any_length(how: str, loss_on: str) -> None:
    """X1: positions that follow the length of the sequences."""
    bare, parallel = pair(
        lambda: looking_up(how, None), 3, loss_on=loss_on, loss="mse", optimizer="adam",
    )  # fmt: skip
    assert_same_fit(bare, parallel, counted((6, 1, 7, 3)), epochs=2)
    assert_same_fit(bare, parallel, counted((6, 3, 5), 4))
    assert_same_fit(bare, parallel, rows(9, 4, WIDTH), rows(9, 2), batch_size=6)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_words_and_positions_of_any_length(loss_on: str) -> None:
    """X1: one table for words and positions, of sequences of any length."""
    bare, parallel = pair(
        lambda: looking_up("words and positions", None), 3,
        loss_on=loss_on, loss="mse", optimizer="adam",
    )  # fmt: skip
    assert_same_fit(bare, parallel, counted((6, 1, 4)), epochs=2)


def test_lengths_that_nobody_knows() -> None:
    """X1: two kinds of slices in one gradient, and no way to tell where one ends."""
    gradient = tf.IndexedSlices(tf.ones([3, 1]), tf.constant([0, 1, 0]), tf.constant([4, 1]))
    with pytest.raises(ValueError, match=r"(?s)how many rows of a weight.*keras\.Input\(\(length,"):
        sparse.apart(gradient, [(slices.ROWS, None), (slices.SAME, None)])


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mode", ["run_eagerly", "jit_compile"])
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("how", ["positions", "words", "words and positions"])
def test_ways_to_run(how: str, loss_on: str, mode: str) -> None:
    """X1: without a graph, and by XLA."""
    bare, parallel = pair(
        lambda: looking_up(how), 3, loss_on=loss_on, loss="mse",
        optimizer=lambda: keras.optimizers.RMSprop(0.01), **{mode: True},
    )  # fmt: skip
    x, y = rows(8, STEPS, WIDTH), rows(8, 2, seed=1)
    assert_same_fit(bare, parallel, x, y, batch_size=6)


def on_sparse() -> keras.Model:
    inputs = keras.Input((WORDS,), sparse=True)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(3)(inputs)))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "lion", "clipnorm", "clipvalue"])
def test_dense_layers_on_sparse_inputs(optimizer: str, loss_on: str) -> None:
    """X1: their gradient names each row once, however many rows of the batch have it."""
    x = rows(9, WORDS) * (rng(2).random((9, WORDS)) < 0.4)
    y = rows(9, 2, seed=1)
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), y)).batch(5)
    bare, parallel = pair(
        on_sparse, 3, loss_on=loss_on, loss="mse", optimizer=OPTIMIZERS[optimizer]
    )
    assert_same_fit(bare, parallel, data, epochs=2)


class OwnSteps(keras.Model):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = looking_up(how)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.inner(x, training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("how", ["positions", "words", "words and positions"])
def test_steps_of_the_templates_own(how: str) -> None:
    """X1: the gradient that a tape over the model gives."""
    bare, parallel = pair(lambda: OwnSteps(how), 3, optimizer="adam")
    x, y = rows(8, STEPS, WIDTH), rows(8, 2, seed=1)
    bare(x), parallel(x)
    assert_same_fit(bare, parallel, x, y, batch_size=6)


@pytest.mark.parametrize("how", WAYS)
def test_gradients_have_the_rows_of_one_device(how: str) -> None:
    """X1: a tape over a call gives slices that name the same rows as often."""
    model = looking_up(how)
    parallel = pk.DataParallelModel(model, 3)
    x = tf.constant(rows(7, STEPS, WIDTH))

    @tf.function(autograph=False)
    def gradient(called: keras.Model) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(called(x) ** 2)
        return tape.gradient(loss, model.trainable_variables[0].value)

    one, several = gradient(model), gradient(parallel)
    assert isinstance(several, tf.IndexedSlices)
    orders = [np.argsort(g.indices.numpy(), kind="stable") for g in (one, several)]
    indices = [g.indices.numpy()[o] for g, o in zip((one, several), orders, strict=True)]
    np.testing.assert_array_equal(*indices)
    values = [g.values.numpy()[o] for g, o in zip((one, several), orders, strict=True)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5, atol=1e-6)
