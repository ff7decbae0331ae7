"""Faults found by running real programs bare and wrapped: tensors that `call` leaves on layers.

The id above each test is that of the kind of fault.
"""

import collections
import dataclasses
import weakref
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, assert_same_variables, batches, pair, rows

TOWERS = [1, 3]


class Encoder(keras.layers.Layer):
    """An inner layer that leaves what it computed in an attribute, a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(4, "tanh")
        self.kept: list[Any] = []
        self.named: dict[str, Any] = {"old": 1.0}
        self.center: Any = None

    def call(self, x: Any) -> Any:
        self.hidden = self.dense(x)
        self.kept = [self.hidden * 2, (self.hidden[:, :1], "text")]
        self.named["square"] = tf.square(self.hidden)
        self.center = tf.reduce_mean(self.hidden)
        self.table = tf.reshape(tf.range(12.0), (6, 2)) / 10
        return self.hidden


class Reads(keras.Model):
    """Its loss reads what the encoder left."""

    inner: type[keras.layers.Layer] = Encoder

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.top = self.inner(), keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.top(self.encoder(x))

    def penalty(self) -> Any:
        left = self.encoder
        values = [left.hidden, left.kept[0], left.kept[1][0], left.named["square"], left.table]
        return left.center + sum(
            weight * tf.reduce_mean(value) for weight, value in enumerate(values, start=1)
        )

    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> Any:
        del x, sample_weight, training
        # Of all pairs of rows, so that the order of the rows and the whole batch count.
        near = tf.matmul(self.encoder.hidden, y_pred[:, :1] * y[:, :1], transpose_a=True)
        return tf.reduce_mean(tf.square(y - y_pred)) + self.penalty() + tf.reduce_sum(near)


class StepReads(Reads):
    compute_loss = keras.Model.compute_loss

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = tf.reduce_mean(tf.square(y - y_pred)) + self.penalty()
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class MetricsRead(Reads):
    compute_loss = keras.Model.compute_loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        metrics = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**metrics, "size": tf.reduce_mean(self.encoder.hidden * y[:, :1])}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [Reads, StepReads, MetricsRead])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("towers", TOWERS)
def test_losses_and_metrics_read_what_call_left(towers: int, eager: bool, kind: Any) -> None:
    """X15: the rows of the whole batch, in order, with gradients."""
    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(kind, towers, optimizer="adam", loss="mse", run_eagerly=eager)
    assert_same_fit(bare, parallel, x, y, batch_size=3, epochs=2)
    if kind is not StepReads:
        results = [model.evaluate(x, y, verbose=0) for model in (bare, parallel)]
        np.testing.assert_allclose(results[1], results[0], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("towers", TOWERS)
def test_batches_of_unknown_size(towers: int) -> None:
    """X15: smaller than the number of towers, too."""
    x, y = rows(9, 3), rows(9, 2)
    bare, parallel = pair(Reads, towers, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, batches([4, 2, 3], x, y))


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("loss_on", "eager"), [("auto", False), ("towers", False), ("auto", True), ("merged", True)]
)
def test_losses_on_the_towers(loss_on: str, eager: bool) -> None:
    """X15: what nobody can read costs nothing, and what is left eagerly is the whole batch's."""

    class Leaves(Reads):
        compute_loss = keras.Model.compute_loss

    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(
        Leaves, 3, loss_on=loss_on, optimizer="adam", loss="mse", metrics=["mae"], run_eagerly=eager
    )
    assert_same_fit(bare, parallel, x, y, batch_size=4, epochs=2)
    if eager:
        expected, actual = bare.encoder, parallel.template.encoder
        for one, other in (
            (actual.hidden, expected.hidden),
            (actual.kept[1][0], expected.kept[1][0]),
            (actual.named["square"], expected.named["square"]),
        ):
            np.testing.assert_allclose(one, other, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("towers", TOWERS)
def test_a_direct_call_leaves_what_it_leaves_on_one_device(towers: int) -> None:
    """X15: numbers that can be read, at each call, and differentiated."""
    bare, parallel = pair(Reads, towers)
    bare(rows(2, 3))
    parallel(rows(2, 3))
    for count in (7, 2, 7):
        x = tf.constant(rows(count, 3, seed=count))
        found = []
        for model, reads in ((bare, bare), (parallel, parallel.template)):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = model(x)
                total = tf.reduce_sum(y) + reads.penalty()
            found.append([y, total, tape.gradient(total, x), reads.encoder.hidden])
            assert reads.encoder.kept[1][1] == "text"
            assert reads.encoder.named["old"] == 1.0
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)
    assert_same_variables(bare, parallel)


class Pairs(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        self.near = tf.matmul(x, x, transpose_b=True)
        return x


def test_what_cannot_be_merged_is_named() -> None:
    """X15: an error that names the layer and the attribute."""
    model = keras.Sequential([keras.Input((3,)), Pairs(name="pairs"), keras.layers.Dense(1)])
    parallel = pk.DataParallelModel(model, 3)
    with pytest.raises(ValueError, match="attribute 'near' of layer 'pairs'"):
        parallel(rows(6, 3))
    parallel = pk.DataParallelModel(model, 3, rules={"near": "whole"})
    assert parallel(rows(6, 3)).shape == (6, 1)
    assert model.layers[0].near.shape == (2, 2)


class Notes:
    """A plain object of the user's."""

    def __init__(self) -> None:
        self.old, self.calls, self.list = "text", [1], []


@dataclasses.dataclass(frozen=True)
class Seen:
    hidden: Any
    pair: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


GLOBAL_LIST: list[Any] = []
GLOBAL_KEYS: Any = weakref.WeakKeyDictionary()
GLOBAL_TENSOR: Any = None


def note(hidden: Any) -> None:
    GLOBAL_LIST.append(hidden * 2)


class LeavesAnywhere(Encoder):
    """Leaves what it computed in what is no attribute, list or dict."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()
        self.last: Any = collections.deque(maxlen=2)
        self.by_key = {0: None}

    def call(self, x: Any) -> Any:
        global GLOBAL_TENSOR  # noqa: PLW0603 (as users do)
        hidden = self.dense(x)
        self.notes.hidden = hidden
        self.notes.list.append(hidden)
        self.seen = Seen(hidden, Pair(hidden + 1, tf.reduce_mean(hidden)))
        self.last.append(hidden)
        self.by_key[0] = hidden
        self.by_key[1, "block/attention"] = hidden
        self.named["block/attention"] = hidden
        GLOBAL_LIST.clear()
        note(hidden)
        GLOBAL_KEYS[self] = hidden
        GLOBAL_TENSOR = hidden + 3
        return hidden


class ReadsAnywhere(Reads):
    inner = LeavesAnywhere

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return keras.Model.compute_loss(self, *args, **kwargs) + self.penalty()

    def penalty(self) -> Any:
        left = self.encoder
        assert left.notes.old == "text"
        assert left.notes.calls == [1]
        values = [
            *(left.notes.hidden, left.notes.list[-1], left.seen.hidden, left.seen.pair.first),
            *(left.last[-1], left.by_key[0], left.by_key[1, "block/attention"]),
            *(left.named["block/attention"], GLOBAL_LIST[0], GLOBAL_KEYS[left], GLOBAL_TENSOR),
        ]
        # Read once: a later call must leave its own.
        left.notes.list.clear()
        return left.seen.pair.second + sum(
            weight * tf.reduce_mean(value * value) for weight, value in enumerate(values, start=1)
        )


@pytest.mark.parametrize("eager", [False, True])
def test_what_call_leaves_anywhere(eager: bool) -> None:
    """X15: in objects, tuples with names, under any key, and around the functions of a layer."""
    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(ReadsAnywhere, 3, optimizer="adam", loss="mse", run_eagerly=eager)
    assert_same_fit(bare, parallel, x, y, batch_size=4, epochs=2)


class LeavesNumbers(Encoder):
    """Leaves single numbers, each of another kind."""

    def call(self, x: Any) -> Any:
        self.hidden = self.dense(x)
        size = tf.shape(x)[0]
        self.rows, self.mean = size, tf.reduce_mean(self.hidden)
        self.named["sum"] = tf.reduce_sum(tf.square(self.hidden))
        self.largest, self.smallest = tf.reduce_max(self.hidden), tf.reduce_min(self.hidden)
        self.any, self.same = tf.reduce_any(self.hidden[:, 0] > 0.3), tf.constant(3)
        return self.hidden


class ReadsNumbers(ReadsAnywhere):
    inner = LeavesNumbers

    def penalty(self) -> Any:
        left = self.encoder
        numbers = [left.mean, left.named["sum"] / tf.cast(left.rows, tf.float32)]
        numbers += [left.largest, left.smallest, tf.cast(left.any, tf.float32)]
        return tf.add_n([tf.cast(left.same, tf.float32), *numbers])


@pytest.mark.parametrize("eager", [False, True])
def test_numbers_that_call_leaves(eager: bool) -> None:
    """X15: found out from a few rows, as it is for terms of the loss."""
    x, y = rows(9, 3), rows(9, 2)
    bare, parallel = pair(ReadsNumbers, 3, optimizer="sgd", loss="mse", run_eagerly=eager)
    assert_same_fit(bare, parallel, batches([4, 2, 3], x, y))


class LeavesSize(Encoder):
    calls, of_batch = 0, 0

    def call(self, x: Any) -> Any:
        self.calls = 2
        self.of_batch = keras.ops.shape(x)[0]
        self.hidden = self.dense(x)
        return self.hidden


class ReadsSize(ReadsNumbers):
    inner = LeavesSize

    def penalty(self) -> Any:
        size = tf.cast(self.encoder.of_batch * self.encoder.calls, tf.float32)
        return tf.reduce_sum(self.encoder.hidden**2) / size


@pytest.mark.parametrize("eager", [False, True])
def test_a_number_of_rows_that_python_knows(eager: bool) -> None:
    """X15: left as an integer where the size of the batch is known, else as a tensor."""
    x, y = rows(8, 3), rows(8, 2)
    bare, parallel = pair(ReadsSize, 3, optimizer="sgd", loss="mse", run_eagerly=eager)
    for size in (2, 8, 7, 8):
        losses = [model.train_on_batch(x[:size], y[:size]) for model in (bare, parallel)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=RTOL)
    assert_same_fit(bare, parallel, x, y, batch_size=3)
    parallel(x[:6])
    assert parallel.template.encoder.of_batch == 6


class LeavesDeviation(Encoder):
    def __init__(self, deviation: Any) -> None:
        super().__init__()
        self.made = deviation

    def call(self, x: Any) -> Any:
        self.deviation = self.made(x)
        return self.dense(x)


@pytest.mark.parametrize("made", [tf.math.reduce_std, lambda x: tf.reduce_any(x > 1e6)])
def test_a_number_that_parts_cannot_make_is_named(made: Any) -> None:
    """X15: one that needs all rows, or that a few rows do not tell about."""
    layer = LeavesDeviation(made)
    layer.name = "spread"
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"attribute 'deviation' of layer 'spread'.*no mean or"):
        pk.DataParallelModel(model, 3).predict(rows(7, 3), verbose=0)
    parallel = pk.DataParallelModel(model, 3, rules={"deviation": "mean"})
    assert parallel(rows(7, 3)).shape == (7, 1)


def test_a_batch_makes_the_weights() -> None:
    """X15: of a template that none were made for yet, in any kind of step."""

    class Plain(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            hidden = self.dense(x)
            self.kept = hidden
            return {"a": hidden, "b": hidden}

    x, y = rows(7, 3), {"a": rows(7, 2), "b": rows(7, 2, seed=1)}
    for towers, eager in ((1, True), (3, True), (3, False)):
        how = {"loss_on": "merged", "run_eagerly": eager}
        bare, parallel = pair(Plain, towers, optimizer="sgd", loss="mse", **how)
        losses = [model.train_on_batch(x, y)[0] for model in (bare, parallel)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=RTOL)
        # One tensor in several places has the gradient of each.
        assert_same_variables(bare, parallel)
