"""What TensorFlow keeps for a process, and what towers share of it: tables, Python functions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import RTOL, Waits, assert_same_fit, batches, pair, rows
from tests.versions import since

WORDS = np.array([["a", "b"], ["b", "x"], ["c", "c"], ["a", "c"], ["x", "b"], ["b", "a"]])


class HashTable(keras.layers.Layer):
    """A table of TensorFlow itself, also read in a condition."""

    def __init__(self) -> None:
        super().__init__()
        values = tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([1, 2], tf.int64))
        self.table = tf.lookup.StaticHashTable(values, 0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        some = tf.shape(x)[0] > 0
        ids = tf.cond(some, lambda: self.table.lookup(x), lambda: tf.zeros_like(x, tf.int64))
        return ids + 0 * self.table.size()


LOOKUPS: dict[str, Callable[[], keras.layers.Layer]] = {
    "strings": lambda: keras.layers.StringLookup(vocabulary=["a", "b", "c"]),
    "text": lambda: keras.layers.TextVectorization(
        vocabulary=["a", "b", "c"], output_sequence_length=2
    ),
    "tensorflow": HashTable,
}


def looking_up(make: Callable[[], keras.layers.Layer], *layers: keras.layers.Layer) -> keras.Model:
    columns = () if isinstance(make(), keras.layers.TextVectorization) else (2,)
    return keras.Sequential(
        [
            keras.Input((*columns,), dtype="string")
            if columns
            else keras.Input((), dtype="string"),
            make(),
            keras.layers.Embedding(5, 3),
            keras.layers.Flatten(),
            *layers,
            keras.layers.Dense(1),
        ]
    )


def words(make: Callable[[], keras.layers.Layer]) -> np.ndarray:
    if isinstance(make(), keras.layers.TextVectorization):
        return np.array([" ".join(row) for row in WORDS])
    return WORDS


@pytest.mark.parametrize(
    "name",
    [
        *("strings", "tensorflow"),
        pytest.param("text", marks=since("3.9", "its output has no length that Flatten can know")),
    ],
)
def test_towers_do_not_wait_for_a_table(name: str) -> None:
    """X16: calls that take one table's handle were chained."""
    make = LOOKUPS[name]
    barrier = threading.Barrier(3, timeout=60)
    template = looking_up(make, Waits(barrier))
    parallel = pk.DataParallelModel(template, 3)
    # One after the other, they would meet nobody at the barrier.
    parallel.predict(tf.constant(words(make)), batch_size=6, verbose=0)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_towers_that_talk_may_look_things_up(loss_on: str) -> None:
    """X16: towers that wait for each other's sums and for a table waited for ever."""
    build = lambda: looking_up(  # noqa: E731
        LOOKUPS["strings"], keras.layers.BatchNormalization(synchronized=True)
    )
    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    data = tf.data.Dataset.from_tensor_slices((WORDS, rows(6, 1))).batch(4)
    assert_same_fit(bare, parallel, data, epochs=2, rtol=1e-4)


def test_towers_that_talk_may_not_wait_for_anything_else() -> None:
    """X16: refused instead of waiting for ever."""

    class Reads(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.queue = tf.queue.FIFOQueue(10, [tf.float32], [()])

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x + tf.cast(self.queue.size(), tf.float32)

    template = keras.Sequential(
        [keras.Input((4,)), Reads(), keras.layers.BatchNormalization(synchronized=True)]
    )
    parallel = pk.DataParallelModel(template, 3)
    with pytest.raises(ValueError, match=r"wait for each other to use .*devices=1"):
        parallel.predict(rows(6, 4), verbose=0)


class Python(keras.layers.Layer):
    """A Python function that TensorFlow differentiates."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.py_function(lambda v: tf.tanh(v), [x], tf.float32), x.shape)


class PythonInALoop(keras.layers.Layer):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        function = lambda: tf.py_function(lambda v: tf.tanh(v), [x], tf.float32)  # noqa: E731
        y = tf.cond(tf.shape(x)[0] > 0, function, lambda: x)
        return tf.ensure_shape(y, x.shape)


@pytest.mark.parametrize(
    ("layer", "loss_on"), [(Python, "merged"), (Python, "towers"), (PythonInALoop, "towers")]
)
def test_gradients_through_python_functions(layer: Any, loss_on: str) -> None:
    """X21: towers shared the key under which TensorFlow keeps the way back."""
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((4,)), keras.layers.Dense(3), layer(), keras.layers.Dense(2)]
    )
    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    sizes = [7, 2, 3, 7, 7, 7]
    data = batches(sizes, rows(33, 4), rows(33, 2, seed=1))
    assert_same_fit(bare, parallel, data, epochs=3)
    x = rows(7, 4)
    np.testing.assert_allclose(parallel.predict(x, verbose=0), bare.predict(x, verbose=0), RTOL)
