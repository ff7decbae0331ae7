"""The harness of the parity tests: the bare model on one device beside the wrapper on several."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk

RTOL = 1e-5
# Sums of numbers that cancel: below this, float32 has no digits to compare.
ATOL = 2e-6

Build = Callable[[], keras.Model]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Distinct random rows."""
    return rng(seed).normal(size=(count, *shape)).astype("float32")


def batches(sizes: Sequence[int], *arrays: Any) -> tf.data.Dataset:
    """A dataset of batches of these sizes, of which TensorFlow knows no size while tracing.

    Arrays may stand in nests.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def generate() -> Any:
        for start, size in zip(starts, sizes, strict=False):
            yield tf.nest.map_structure(lambda a, s=start, n=size: a[s : s + n], arrays)

    signature = tf.nest.map_structure(
        lambda a: tf.TensorSpec((None, *a.shape[1:]), a.dtype), arrays
    )
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(sizes)))


def pair(
    build: Build,
    towers: int,
    *,
    loss_on: str = "auto",
    rules: Any = None,
    weights_on: str = "auto",
    **compile_arguments: Any,
) -> tuple[keras.Model, pk.DataParallelModel]:
    """A bare model and a wrapped one with the same weights, compiled alike.

    Arguments that hold state (optimizer, losses, metrics) are given as functions.
    """

    def one() -> keras.Model:
        keras.utils.set_random_seed(7)
        model = build()
        model.compile(**{k: v() if _is_maker(v) else v for k, v in compile_arguments.items()})
        return model

    arguments = {"loss_on": loss_on, "rules": rules, "weights_on": weights_on}
    return one(), pk.DataParallelModel(one(), towers, **arguments)


def _is_maker(value: Any) -> bool:
    return getattr(value, "__name__", None) == "<lambda>"


def assert_same_fit(
    bare: keras.Model, parallel: pk.DataParallelModel, *args: Any, rtol: float = RTOL, **kwargs: Any
) -> None:
    """Fits both and compares every number of the History and every variable."""
    histories = []
    for model in (bare, parallel):
        keras.utils.set_random_seed(11)
        histories.append(model.fit(*args, verbose=0, shuffle=False, **kwargs).history)
    assert list(histories[0]) == list(histories[1])
    for key, values in histories[0].items():
        np.testing.assert_allclose(histories[1][key], values, rtol=rtol, atol=ATOL, err_msg=key)
    assert_same_variables(bare, parallel, rtol=rtol)


def assert_same_variables(
    bare: keras.Model, parallel: pk.DataParallelModel, rtol: float = RTOL
) -> None:
    """Weights, state and optimizer variables are equal."""
    pairs = [(bare.variables, parallel.template.variables)]
    if getattr(bare, "optimizer", None) is not None:
        pairs.append((bare.optimizer.variables, parallel.optimizer.variables))
    for expected, actual in pairs:
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_allclose(
                other.numpy(), one.numpy(), rtol=rtol, atol=ATOL * scale(one), err_msg=one.path
            )


def scale(variable: keras.Variable) -> float:
    """The size of the numbers in a variable: cancelled digits are relative to it."""
    return max(1.0, float(np.abs(variable.numpy()).max(initial=0)))


def mlp() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(7, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )


class Waits(keras.layers.Layer):
    """Each call waits for others at a barrier: one after the other, they would wait for ever."""

    def __init__(self, barrier: threading.Barrier, *, stateful: bool = True) -> None:
        super().__init__()
        self.barrier = barrier
        self.keeps_state = stateful

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def wait(value: np.ndarray) -> np.ndarray:
            self.barrier.wait()
            return value

        waited = tf.numpy_function(wait, [x], tf.float32, stateful=self.keeps_state)
        return x + 0 * tf.stop_gradient(tf.ensure_shape(waited, x.shape))


def row_wise(y_true: Any, y_pred: Any) -> Any:
    """A metric or loss of the user's own that looks at one row at a time."""
    return keras.ops.sum(keras.ops.abs(y_true - y_pred) ** 1.5, axis=-1)
