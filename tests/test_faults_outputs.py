"""Outputs are those of one device, or an error says which is not and what to do."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, batches, rows

TOWERS = 3


class Returns(keras.Model):
    """Returns its hidden state `(batch, 4)`, and what this function makes of it."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(4, name="dense")
        self.make = make

    def call(self, x: Any) -> Any:
        h = self.dense(x)
        return {"h": h, "deep": [self.make(h, self.dense)]}


OPS = keras.ops
# What does not depend on the rows, and what is in their order.
SAME: dict[str, Callable[[Any, Any], Any]] = {
    "a table": lambda h, dense: dense.kernel + 0.0,
    "a product of weights": lambda h, dense: OPS.matmul(OPS.transpose(dense.kernel), dense.kernel),
    "numbers": lambda h, dense: OPS.arange(6),
    "rows for each row": lambda h, dense: OPS.reshape(h, (-1, 2)),
    "pixels": lambda h, dense: OPS.reshape(OPS.repeat(h, 4, axis=1), (-1, 4, 4)),
    "one column": lambda h, dense: h[:, :1],
}
# What a device with a part of the rows cannot compute.
REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "time first": (lambda h, d: OPS.transpose(h), "axis 1, not on the first.*transpose the output"),
    "steps first": (
        lambda h, d: OPS.transpose(OPS.repeat(h[:, None], 6, axis=1), (1, 0, 2)),
        "axis 1, not on the first.*transpose the output",
    ),
    "pairs": (lambda h, d: OPS.matmul(h, OPS.transpose(h)), "axis 1 too.*pairs of rows"),
    "distances": (
        lambda h, d: OPS.sum(OPS.square(h[:, None] - h[None]), axis=-1),
        "axis 1 too.*pairs of rows",
    ),
    "prototypes": (lambda h, d: OPS.matmul(OPS.transpose(h), h), "made of them.*merged outputs"),
    "a row more": (
        lambda h, d: OPS.concatenate([OPS.zeros_like(h[:1]), h], axis=0),
        "does not follow the number of rows",
    ),
}
HOW = {
    # How the model is called, on how many rows, and whether TensorFlow knows the number.
    "call": lambda model, x: model(x),
    "predict": lambda model, x: model.predict(x, batch_size=len(x), verbose=0),
    "batches": lambda model, x: model.predict(batches([len(x)], x), verbose=0),
}


def compared(template: keras.Model, parallel: keras.Model, call: Any, x: np.ndarray) -> None:
    expected, actual = (keras.tree.flatten(call(model, x)) for model in (template, parallel))
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", SAME)
def test_what_can_be_merged(name: str) -> None:
    """X7: a table without rows is one table, whatever its size and however it is asked for."""
    template = Returns(SAME[name])
    template(rows(1, 3))
    for size in (6, 7, 2):  # even, uneven, fewer than towers
        for call in HOW.values():
            compared(template, pk.DataParallelModel(template, TOWERS), call, rows(size, 3))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged(name: str) -> None:
    """X7: rows on another axis, all pairs of rows, and what is made of all of them."""
    make, message = REFUSED[name]
    template = Returns(make)
    template(rows(1, 3))
    for size in (6, 7, 3):
        for call in HOW.values():
            parallel = pk.DataParallelModel(template, TOWERS)
            with pytest.raises(ValueError, match=rf"(?s)output deep/0.*{message}"):
                call(parallel, rows(size, 3))


@pytest.mark.parametrize("name", ["pairs", "prototypes", "time first"])
def test_what_cannot_be_merged_eagerly(name: str) -> None:
    """X7: without a graph."""
    make, message = REFUSED[name]
    template = Returns(make)
    template(rows(1, 3))
    parallel = pk.DataParallelModel(template, TOWERS)
    parallel.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=rf"(?s)output deep/0.*{message}"):
        parallel.predict_on_batch(rows(6, 3))


def test_a_table_eagerly() -> None:
    """X7: without a graph."""
    template = Returns(SAME["a table"])
    template(rows(1, 3))
    parallel = pk.DataParallelModel(template, TOWERS)
    parallel.compile("sgd", "mse", run_eagerly=True)
    for size in (6, 7):
        compared(template, parallel, lambda m, x: m.predict_on_batch(x), rows(size, 3))


class Pairs(keras.Model):
    """Scores all pairs of rows; the loss of a row is about its line."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x: Any) -> Any:
        h = self.dense(x)
        return OPS.matmul(h, OPS.transpose(h))


@pytest.mark.parametrize("size", [6, 7, 3])
def test_pairs_do_not_reach_the_loss(size: int) -> None:
    """X7: targets of one column fit the lines of any part of the pairs."""
    parallel = pk.DataParallelModel(Pairs(), TOWERS)
    parallel.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"(?s)axis 1 too.*pairs of rows"):
        parallel.train_on_batch(rows(size, 3), rows(size, 1))


class OwnStep(Returns):
    def train_step(self, data: Any) -> dict[str, Any]:
        x, *_ = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = tf.reduce_sum(outputs["h"] ** 2) + tf.reduce_sum(outputs["deep"][0] ** 3)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_in_steps_of_the_templates_own() -> None:
    """X7: the gradient of a table is that of one device, too."""
    weights = []
    for wrap in (lambda model: model, lambda model: pk.DataParallelModel(model, TOWERS)):
        keras.utils.set_random_seed(3)
        template = OwnStep(SAME["a product of weights"])
        template(rows(1, 3))
        model = wrap(template)
        model.compile("sgd")
        for size in (6, 7):
            model.train_on_batch(rows(size, 3) * 0.1, rows(size, 4))
        weights.append([w.numpy() for w in template.weights])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


def test_known_outputs_cost_nothing() -> None:
    """X7: the template is called once for each trace, as ever."""
    calls: list[int] = []

    class Counts(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            calls.append(1)
            return x

    template = keras.Sequential([keras.Input((3,)), Counts(), keras.layers.Dense(2)])
    parallel = pk.DataParallelModel(template, TOWERS)
    parallel.compile("sgd", "mse")
    calls.clear()
    parallel.predict(rows(12, 3), batch_size=6, verbose=0)
    assert len(calls) == 1
    parallel.fit(rows(12, 3), rows(12, 2), batch_size=6, verbose=0)
    assert len(calls) == 3  # the variables of the loss are made first


def test_as_many_columns_as_rows_of_a_ragged_batch() -> None:
    """X7: the rows of ragged inputs can be others, too."""

    class Lengths(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(tf.cast(x.row_lengths()[:, None], "float32"))

    template = Lengths()
    ragged = tf.ragged.constant([[1], [2, 3], [4, 4, 4], [], [5], [6, 7, 8, 9]])
    expected = template(ragged)
    parallel = pk.DataParallelModel(template, TOWERS)
    np.testing.assert_allclose(parallel(ragged), expected, rtol=RTOL, atol=ATOL)


# Outputs that are one number, by what joins those of parts of the batch.
NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "mean": lambda h, dense: OPS.mean(h),
    "sum": lambda h, dense: OPS.sum(h),
    "largest": lambda h, dense: OPS.max(h),
    "rows": lambda h, dense: OPS.shape(h)[0],
    "of weights": lambda h, dense: OPS.sum(dense.kernel),
    "text": lambda h, dense: tf.constant("units"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    """X7: one number of all rows, on as many rows on each device, too."""
    template = Returns(lambda h, dense: [make(h, dense) for make in [NUMBERS[name]]])
    parallel = pk.DataParallelModel(template, TOWERS)
    for count in (6, 7):
        expected, actual = (
            keras.tree.flatten(model(rows(count, 3))) for model in (template, parallel)
        )
        if name == "text":
            assert actual[0].numpy() == expected[0].numpy()
        else:
            np.testing.assert_allclose(actual[0], expected[0], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "make", [lambda h, d: OPS.concatenate([h, 2 * h], 0), lambda h, d: OPS.tile(h, (2, 1))]
)
def test_rows_out_of_order(make: Any) -> None:
    """X7: two views of each row, all of one before all of the other."""
    parallel = pk.DataParallelModel(Returns(make), TOWERS)
    for count in (6, 7):
        with pytest.raises(
            ValueError, match=r"rows of the batch in order.*output deep/0.*Received"
        ):
            parallel(rows(count, 3))


class Over(keras.layers.Layer):
    """Applies a function to its inputs `(batch, 4)`."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__(name="over")
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


class Whitened(keras.layers.Layer):
    """A normalisation of its own, over the rows while it is trained."""

    def call(self, x: Any, training: bool = False) -> Any:
        return (x - OPS.mean(x, axis=0)) / (OPS.std(x, axis=0) + 0.1) if training else x


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
def test_mixing_while_training_beside_layers_that_draw(
    mixes: bool, eager: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """X13: what they do to rows does not hide what another layer does."""
    chance = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
    softmax = Over(lambda x: OPS.softmax(x - OPS.max(x)))
    layers = [*chance, Whitened(name="over") if mixes else softmax, keras.layers.GaussianNoise(1)]
    template = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    parallel = pk.DataParallelModel(template, TOWERS)
    parallel.compile("sgd", "mse", run_eagerly=eager)
    parallel.fit(rows(7, 4), rows(7, 2), verbose=0)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("several rows at once, likely in layer 'over'" in text for text in texts) == (
        mixes and not eager
    )
    assert sum("there is no graph that tells whether layer" in text for text in texts) == eager


def attended(x: Any) -> Any:
    return tf.matmul(tf.nn.softmax(tf.matmul(x, x, transpose_b=True)), x)


def len_of(x: Any) -> Any:
    return 1 + tf.reduce_sum(tf.abs(x))


def sign(x: Any) -> Any:
    return tf.cast(x[:, :1] > 0, tf.int32)


MIXING: dict[str, Callable[[], keras.layers.Layer]] = {
    "reversed": lambda: Over(lambda x: x[::-1]),
    "centred": lambda: Over(lambda x: x - OPS.mean(x, axis=0)),
    "mixed up": lambda: Over(lambda x: 0.8 * x + 0.2 * tf.gather(x, tf.argsort(x[:, 0]))),
    "summed up": lambda: Over(lambda x: OPS.cumsum(x, axis=0)),
    "attention": lambda: Over(
        lambda x: OPS.matmul(OPS.softmax(OPS.matmul(x, OPS.transpose(x))), x)
    ),
    "axis": lambda: keras.layers.Softmax(axis=0, name="over"),
    "lambda": lambda: keras.layers.Lambda(lambda x: x - OPS.mean(x, axis=0), name="over"),
    "pairs": lambda: Over(lambda x: x + OPS.mean(OPS.abs(x[None] - x[:, None]), axis=1)),
    "rows attend": lambda: Over(
        lambda x: OPS.reshape(attended(OPS.reshape(x, (1, -1, 4))), (-1, 4))
    ),
    "one softmax": lambda: Over(lambda x: tf.reshape(tf.nn.softmax(tf.reshape(x, [-1])), [-1, 4])),
    "loop": lambda: Over(
        lambda x: tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, y + x[i]), (0, x))[1]
    ),
    "each with all": lambda: Over(
        lambda x: tf.vectorized_map(lambda row: row / len_of(x - row), x)
    ),
    "number of rows": lambda: Over(lambda x: x / OPS.cast(OPS.shape(x)[0], "float32")),
    "number of a row": lambda: Over(
        lambda x: x * OPS.arange(OPS.shape(x)[0], dtype="float32")[:, None]
    ),
    "groups": lambda: Over(
        lambda x: (
            x + tf.gather(tf.tensor_scatter_nd_add(tf.zeros((2, 4)), sign(x), x), sign(x)[:, 0])
        )
    ),
}
APART: dict[str, Callable[[], keras.layers.Layer]] = {
    "largest taken off": lambda: Over(lambda x: OPS.softmax(x - OPS.max(x))),
    "mean of a row": lambda: Over(lambda x: x - OPS.mean(x, axis=-1, keepdims=True)),
    "norm": lambda: keras.layers.BatchNormalization(synchronized=True),
    "recurrent": lambda: keras.Sequential([keras.layers.Reshape((2, 2)), keras.layers.GRU(4)]),
    "heads": lambda: Over(lambda x: OPS.reshape(OPS.relu(OPS.reshape(x, (-1, 2))), (-1, 4))),
    "each by itself": lambda: Over(lambda x: tf.vectorized_map(lambda row: row / len_of(row), x)),
    "loop for all": lambda: Over(
        lambda x: tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, y + x), (0, x))[1]
    ),
}


@pytest.mark.sweep(6)
@pytest.mark.parametrize("name", [*MIXING, *APART])
def test_layers_that_look_at_several_rows_are_named(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """X13: no error, as it may be meant so, but nobody is left without a word; once."""
    layer = {**MIXING, **APART}[name]()
    template = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    parallel = pk.DataParallelModel(template, TOWERS)
    parallel.compile("sgd", "mse")
    parallel.predict(rows(7, 4), verbose=0)
    if name in MIXING:
        parallel.evaluate(rows(6, 4), rows(6, 2), verbose=0)
    said = [r.getMessage() for r in caplog.records if "several rows at once" in r.getMessage()]
    assert len(said) == (name in MIXING)
    assert all("in layer 'over'" in message for message in said)
