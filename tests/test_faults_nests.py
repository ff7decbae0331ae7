"""Nests that TensorFlow knows and Keras takes for leaves."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import attr
import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import nests, shard
from tests.parity import ATOL, RTOL, assert_same_fit, batches, pair, rows


@dataclasses.dataclass
class Flat:
    name: str
    x: Any
    y: Any

    def __tf_flatten__(self) -> Any:
        return (self.name,), (self.x, self.y)

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, leaves: Any) -> Flat:
        return cls(*metadata, *leaves)


class Extension(tf.experimental.ExtensionType):
    x: tf.Tensor
    y: tf.Tensor
    name: str = "extension"


class Ordered(collections.OrderedDict):
    note = "kept"


class Pair(collections.namedtuple("Pair", "x y")):
    @property
    def both(self) -> Any:
        return self.x + self.y


MAKERS: list[Callable[[Any, Any], Any]] = [
    lambda x, y: Flat("flat", x, y),
    Extension,
    lambda x, y: Ordered(y=y, x=x),
    lambda x, y: collections.defaultdict(list, y=y, x=x),
    Pair,
    lambda x, y: {"a": [Flat("inner", x, Ordered(y=y))]},
]
NAMES = ["dataclass", "extension", "ordered", "defaultdict", "namedtuple", "nested"]


def leaves(value: Any) -> list[Any]:
    return [np.asarray(x) for _, x in nests.flatten_with_paths(value) if tf.is_tensor(x)]


class Gives(keras.Model):
    """Returns what a maker makes of two outputs."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.make = make
        self.dense = keras.layers.Dense(3)

    def call(self, x: Any) -> Any:
        y = self.dense(x)
        return self.make(y, tf.tanh(y))

    def train_step(self, batch: Any) -> dict[str, Any]:
        x, target = batch
        with tf.GradientTape() as tape:
            given = self(x, training=True)
            loss = tf.add_n([tf.reduce_sum(tf.square(v - target)) for v in tf.nest.flatten(
                given, expand_composites=True)])  # fmt: skip
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Takes(keras.Model):
    """Takes what a maker makes by name, as Keras wants it, and is built by the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(6)

    def call(self, x: Any, given: Any = None) -> Any:
        first, second = tf.nest.flatten(given, expand_composites=True)
        return self.dense(first) - second + x


@pytest.mark.sweep(3)
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_outputs_of_other_classes(make: Any) -> None:
    """X4: only the first tower's rows came back."""
    bare, parallel = pair(lambda: Gives(make), 3, optimizer="sgd")
    x = rows(7, 6)
    bare(x)
    parallel(x)  # unbuilt until now
    parallel.template.set_weights(bare.get_weights())
    expected, actual = bare(x), parallel(x)
    # TensorFlow makes a dict of a defaultdict.
    assert isinstance(expected, type(actual))
    assert [path for path, _ in nests.flatten_with_paths(actual)] == [
        path for path, _ in nests.flatten_with_paths(expected)
    ]
    for one, other in zip(leaves(expected), leaves(actual), strict=True):
        np.testing.assert_allclose(other, one, RTOL, ATOL)
    data = batches([7, 2, 3], rows(12, 6), rows(12, 3, seed=1))
    assert_same_fit(bare, parallel, data)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_inputs_of_other_classes(make: Any) -> None:
    """X4: each tower got all rows."""
    bare, parallel = Takes(), pk.DataParallelModel(Takes(), 3)
    for count in (7, 2):
        x = tf.constant(rows(count, 6))
        # An order that all of these have.
        given = make(x + 1, x + 2)
        results = []
        for model, weights in ((bare, bare), (parallel, parallel.template)):
            model(x, given=given)
            if model is parallel:
                weights.set_weights(bare.get_weights())
            with tf.GradientTape() as tape:
                outputs = model(x, given=given)
                loss = tf.reduce_sum(tf.square(outputs))
            results.append([outputs, *tape.gradient(loss, [w.value for w in weights.weights])])
        for one, other in zip(*results, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(other, one, RTOL, ATOL)


def test_attrs_classes() -> None:
    """X4: as TensorFlow knows them."""
    made = attr.make_class("Made", ["x", "y"])
    given = made(tf.range(5), [tf.range(5), None])
    parts = shard.shard({"a": given}, 2).parts
    assert [type(part["a"]) for part in parts] == [made, made]
    np.testing.assert_array_equal(parts[1]["a"].y[0], [3, 4])


def test_nests_keep_their_order_and_classes() -> None:
    given = {"b": Ordered(z=1, a=2), "a": (3, Pair(4, [None]))}
    assert nests.packed(given, [leaf for _, leaf in nests.flatten_with_paths(given)]) == given
    assert [leaf for _, leaf in nests.flatten_with_paths(given)] == [3, 4, None, 1, 2]
    again = nests.mapped(lambda leaf: leaf, given)
    assert type(again["b"]) is Ordered
    assert again["a"][1].x == 4
