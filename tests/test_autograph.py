"""AutoGraph translates of the user's code what it does on one device, and nothing of the library's.

In a `tf.function` of the user's it follows calls into all packages but a few that it knows.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import keras
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_variables, rows

# A piece of the name of each file with translated code.
TRANSLATED = "__autograph_generated_file"


class Notes(keras.layers.Layer):
    """Notes which functions around it were translated."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[list[str]] = []

    def call(self, x: tf.Tensor) -> tf.Tensor:
        stack = traceback.extract_stack()
        self.stacks.append([frame.name for frame in stack if TRANSLATED in frame.filename])
        return x


def called(model: keras.Model, x: Any, y: Any) -> Any:
    return model(x, training=True)


def trained(model: keras.Model, x: Any, y: Any) -> Any:
    return model.train_step((x, y))


@pytest.mark.parametrize("use", [called, trained])
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_the_library_is_not_translated(loss_on: str, use: Callable[..., Any]) -> None:
    notes = Notes()
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), notes])
    parallel = pk.DataParallelModel(template, 3, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    x, y = rows(7, 4), rows(7, 2)
    parallel.train_on_batch(x, y)
    notes.stacks.clear()

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        return use(parallel, x, y)

    step(x, y)
    assert notes.stacks
    assert {name for stack in notes.stacks for name in stack} == {"tf__step", f"tf__{use.__name__}"}


class Steep(keras.layers.Layer):
    """Gives TensorFlow a function with a condition, which only AutoGraph can translate."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def steep(row: tf.Tensor) -> tf.Tensor:
            if tf.reduce_sum(row) > 0:  # noqa: SIM108 (AutoGraph is meant to see a statement)
                row = 3 * row
            else:
                row = row / 3
            return row

        return tf.map_fn(steep, x)


class StepWithCondition(keras.Model):
    """A step with a condition on what the batch gave."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x, training=True) - y) ** 2)
            if loss > 0.5:
                loss = 2 * loss
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": loss}


def steep() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), Steep(), keras.layers.Dense(2)])


@pytest.mark.parametrize("build", [steep, StepWithCondition])
@pytest.mark.parametrize("towers", [1, 3])
def test_the_users_code_is_translated_as_on_one_device(
    towers: int, build: Callable[[], keras.Model]
) -> None:
    x, y = rows(7, 4), rows(7, 2, seed=1)
    models = []
    for wrap in (lambda model: model, lambda model: pk.DataParallelModel(model, towers)):
        keras.utils.set_random_seed(1)
        template = build()
        template.compile(keras.optimizers.SGD(0.1), "mse")
        template(x[:1])
        template.optimizer.build(template.trainable_variables)
        models.append(wrap(template))
    bare, parallel = models

    def step_of(model: keras.Model) -> Any:
        @tf.function
        def step(x: tf.Tensor, y: tf.Tensor) -> Any:
            return model.train_step((x, y))["loss"]

        return step

    mine, theirs = step_of(parallel), step_of(bare)
    for size in (7, 2, 5):
        loss = theirs(x[:size], y[:size])
        assert float(mine(x[:size], y[:size])) == pytest.approx(float(loss), rel=RTOL, abs=ATOL)
    assert_same_variables(bare, parallel)
