"""Nested, ragged, sparse and string data; outputs of every kind."""

from collections import namedtuple
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import (
    ATOL,
    RTOL,
    assert_same_fit,
    pair,
    rng,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


Point = namedtuple("Point", ["x", "y"])


class Nested(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        a, b = inputs["point"].x, inputs["point"].y
        out = self.dense(a + b[0])
        return {"sum": out, "pair": (out * 2, [a])}


def test_nested_structures() -> None:
    """N11, B4: rows stay in order in every leaf."""
    model = Nested()
    inputs = {"point": Point(rows(7, 6), [rows(7, 6, seed=1)])}
    inputs = tf.nest.map_structure(tf.constant, inputs)
    expected = model(inputs)
    parallel = pk.DataParallelModel(model, 3)
    tf.nest.assert_same_structure(parallel(inputs), expected)
    for actual, one in zip(
        tf.nest.flatten(parallel(inputs)), tf.nest.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(actual, one, rtol=RTOL, atol=ATOL)


class Ragged(keras.Model):
    def call(self, inputs: Any) -> Any:
        return tf.concat([inputs, inputs], axis=1)


def test_ragged() -> None:
    """B6: https://github.com/tensorflow/tensorflow/issues/27170."""
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0], [], [4.0, 5.0, 6.0], [7.0]])
    parallel = pk.DataParallelModel(Ragged(), 3)
    assert parallel(ragged).to_list() == Ragged()(ragged).to_list()
    unknown = tf.function(
        parallel, input_signature=[tf.RaggedTensorSpec([None, None], ragged_rank=1)]
    )
    assert unknown(ragged).to_list() == Ragged()(ragged).to_list()
    assert unknown(ragged[:2]).to_list() == Ragged()(ragged[:2]).to_list()


@pytest.mark.parametrize("count", [2, 10])
def test_sparse(count: int) -> None:
    """B6: https://github.com/keras-team/keras/issues/18414."""
    dense = rows(count, 6) * (rng(1).random((count, 6)) < 0.4)
    sparse = tf.sparse.from_dense(dense.astype("float32"))
    y = rows(count, 3, seed=2)

    def build() -> keras.Model:
        inputs = keras.Input((6,), sparse=True)
        return keras.Model(inputs, keras.layers.Dense(3)(inputs))

    bare, parallel = pair(build, 4, loss="mse", **SGD)
    np.testing.assert_allclose(parallel(sparse), bare(sparse), rtol=RTOL, atol=ATOL)
    data = tf.data.Dataset.from_tensor_slices((sparse, y)).batch(7)
    assert_same_fit(bare, parallel, data, epochs=2)


def test_strings() -> None:
    """B4: https://github.com/tensorflow/tensorflow/issues/29680."""
    lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="one_hot")
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(2)])
    words = tf.constant([["a"], ["c"], ["x"], ["b"], ["a"]])
    parallel = pk.DataParallelModel(model, 3)
    np.testing.assert_allclose(parallel(words), model(words), rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(
        parallel.predict(words, batch_size=3, verbose=0), model(words), rtol=RTOL, atol=ATOL
    )


class ReturnsScalar(keras.Model):
    """B2: a model that returns its own loss."""

    def call(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return keras.ops.mean(x), keras.ops.sum(x), x


def test_scalar_outputs() -> None:
    """B2: https://github.com/matterport/Mask_RCNN/issues/567."""
    x = tf.constant(rows(7, 6))
    for count in (7, 2):
        mean, total, same = pk.DataParallelModel(ReturnsScalar(), 3, rules={"1": "sum"})(x[:count])
        expected = ReturnsScalar()(x[:count])
        assert mean.shape == total.shape == ()
        for actual, one in zip((mean, total, same), expected, strict=True):
            np.testing.assert_allclose(actual, one, rtol=RTOL, atol=ATOL)


class PadsToLongest(keras.Model):
    def call(self, lengths: tf.Tensor) -> tf.Tensor:
        longest = tf.reduce_max(lengths)
        return tf.sequence_mask(lengths[:, 0], longest, dtype=tf.float32)


def test_outputs_of_different_sizes() -> None:
    """B5: https://github.com/pytorch/pytorch/issues/6299."""
    lengths = tf.constant([[1], [4], [2], [7], [3]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="the output to have the same size"):
        pk.DataParallelModel(PadsToLongest(), 3)(lengths)
    padded = pk.DataParallelModel(PadsToLongest(), 3, rules={"output": "pad"})(lengths)
    np.testing.assert_array_equal(padded, PadsToLongest()(lengths))


class UsesAnchors(keras.Model):
    def call(self, inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"near": tf.matmul(inputs["x"], inputs["anchors"]), "anchors": inputs["anchors"]}


def test_whole_leaf() -> None:
    """B4: https://github.com/pytorch/pytorch/issues/75442."""
    inputs = {"x": tf.constant(rows(7, 6)), "anchors": tf.constant(rows(6, 2, seed=1))}
    with pytest.raises(ValueError, match=r"anchors.*must be declared"):
        pk.DataParallelModel(UsesAnchors(), 3)(inputs)
    parallel = pk.DataParallelModel(UsesAnchors(), 3, rules={"anchors": "whole"})
    for name, expected in UsesAnchors()(inputs).items():
        np.testing.assert_allclose(parallel(inputs)[name], expected, rtol=RTOL, atol=ATOL)
