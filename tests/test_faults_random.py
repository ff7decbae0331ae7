"""Random numbers that TensorFlow draws by itself, without a seed generator of Keras."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import batches, rows


class Draws(keras.layers.Layer):
    """Adds what a function draws to its input."""

    def __init__(self, draw: Callable[[tf.Tensor], tf.Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x + self.draw(x)


def normal(x: tf.Tensor) -> tf.Tensor:
    return tf.random.normal(tf.shape(x))


def with_own_seed(x: tf.Tensor) -> tf.Tensor:
    return tf.random.uniform(tf.shape(x), seed=5)


def dropped(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.dropout(tf.ones_like(x), 0.5)


def counted(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.random.uniform(tf.shape(x), 0, 1000, tf.int32), tf.float32)


def poisson(x: tf.Tensor) -> tf.Tensor:
    return tf.random.poisson([], 100 * tf.ones_like(x), seed=2)


def gamma(x: tf.Tensor) -> tf.Tensor:
    return tf.random.gamma([], tf.ones_like(x), seed=2)


def chosen(x: tf.Tensor) -> tf.Tensor:
    chances = tf.zeros([tf.shape(x)[0], 1000])
    return tf.cast(tf.random.categorical(chances, x.shape[1]), tf.float32)


def shuffled(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.random.shuffle(tf.range(64.0)), [1, 64]) + tf.zeros_like(x)


def brightened(x: tf.Tensor) -> tf.Tensor:
    def change(row: tf.Tensor) -> tf.Tensor:
        image = tf.reshape(tf.ones_like(row), [8, 8, 1])
        return tf.reshape(tf.image.random_brightness(image, 0.5), [64])

    # Side by side, rows draw from one stream in any order, also on one device.
    return tf.map_fn(change, x, parallel_iterations=1)


def in_a_loop(x: tf.Tensor) -> tf.Tensor:
    step = lambda i, total: (i + 1, total + tf.random.normal(tf.shape(x)))  # noqa: E731
    return tf.while_loop(lambda i, _: i < 2, step, [0, tf.zeros_like(x)])[1]


def in_a_condition(x: tf.Tensor) -> tf.Tensor:
    draw = lambda: tf.random.truncated_normal(tf.shape(x))  # noqa: E731
    return tf.cond(tf.shape(x)[0] > 0, draw, lambda: tf.zeros_like(x))


@tf.function
def in_a_function(x: tf.Tensor) -> tf.Tensor:
    return tf.random.normal(tf.shape(x))


DRAWS = [
    normal, with_own_seed, dropped, counted, poisson, gamma, chosen, shuffled, brightened,
    in_a_loop, in_a_condition, in_a_function,
]  # fmt: skip


def distinct(values: np.ndarray) -> int:
    return len(np.unique(values, axis=0))


def model(draw: Callable[[tf.Tensor], tf.Tensor]) -> keras.Model:
    return keras.Sequential([keras.Input((64,)), Draws(draw)])


def one_for_each_tower(draw: Callable[[tf.Tensor], tf.Tensor]) -> bool:
    return draw is shuffled


@pytest.mark.sweep(4)
@pytest.mark.parametrize("draw", DRAWS)
def test_towers_draw_from_streams_of_their_own(draw: Callable[[tf.Tensor], tf.Tensor]) -> None:
    """X2: a stateful operation was copied with its seed to each tower."""
    x = np.zeros((6, 64), "float32")
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        parallel = pk.DataParallelModel(model(draw), 3)
        results.append([parallel.predict(x, batch_size=6, verbose=0) for _ in range(2)])
    np.testing.assert_array_equal(results[0], results[1])
    parts = 3 if one_for_each_tower(draw) else 6
    assert distinct(np.concatenate(results[0])) == 2 * parts


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_towers_draw_so_in_fit(loss_on: str) -> None:
    """X2: 7 rows, then 2 (fewer than towers), in both ways to train."""
    seen = []

    class Notes(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            noise = tf.nn.dropout(tf.ones([tf.shape(x)[0], 64]), 0.5)
            note = lambda values: seen.append(values) or np.float32(0)  # noqa: E731
            return x + tf.ensure_shape(tf.numpy_function(note, [noise], tf.float32), ())

    keras.utils.set_random_seed(0)
    template = keras.Sequential([keras.Input((6,)), Notes(), keras.layers.Dense(1)])
    parallel = pk.DataParallelModel(template, 3, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    parallel.fit(batches([7, 2], rows(9, 6), rows(9, 1)), verbose=0, shuffle=False)
    noise = np.concatenate(seen)
    assert distinct(noise) == len(noise) >= 9


def test_one_tower_draws_as_the_bare_model() -> None:
    """X2: and what is drawn after a while, too."""
    x = np.zeros((6, 64), "float32")
    drawn = []
    for wrap in (False, True):
        keras.utils.set_random_seed(3)
        bare = model(normal)
        wrapped = pk.DataParallelModel(bare, 1) if wrap else bare
        drawn.append(wrapped.predict(x, batch_size=2, verbose=0))
    np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("draw", [normal, with_own_seed, dropped, in_a_function])
def test_towers_that_are_not_traced_draw_so(draw: Callable[[tf.Tensor], tf.Tensor]) -> None:
    """X2: without a graph each device keeps the state of a seed, which starts alike."""
    keras.utils.set_random_seed(0)
    parallel = pk.DataParallelModel(model(draw), 3)
    parallel.compile(run_eagerly=True)
    drawn = parallel.predict(np.zeros((6, 64), "float32"), batch_size=6, verbose=0)
    assert distinct(drawn) == 6


def test_a_model_that_draws_nothing_is_traced_once() -> None:
    traces = []

    class Counts(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            traces.append(self)
            return x

    template = keras.Sequential([keras.Input((6,)), Counts(), keras.layers.Dropout(0.5)])
    parallel = pk.DataParallelModel(template, 3)
    traces.clear()
    parallel.predict(rows(6, 6), batch_size=6, verbose=0)
    assert len(traces) == 1


class Fixed(keras.layers.Layer):
    """Adds numbers drawn from a constant seed, for each row or the same for all."""

    def __init__(self, by_rows: bool = True) -> None:
        super().__init__(name="fixed")
        self.by_rows = by_rows

    def call(self, x: tf.Tensor) -> tf.Tensor:
        shape = keras.ops.shape(x) if self.by_rows else (1, x.shape[1])
        return x + keras.random.normal(shape, seed=1)


def test_a_constant_seed_says_what_is_drawn(caplog: pytest.LogCaptureFixture) -> None:
    """X2: no stream, but a value, which is the same wherever it is drawn; the log says so."""
    template = keras.Sequential([keras.Input((3,)), Fixed()])
    zeros = np.zeros((6, 3), "float32")
    whole = template.predict(zeros, verbose=0)
    parallel = pk.DataParallelModel(template, 3)
    parts = parallel.predict(zeros, verbose=0)
    np.testing.assert_allclose(parts, np.concatenate([whole[:2]] * 3), rtol=1e-6)
    parallel(tf.constant(zeros))
    said = [text for text in caplog.messages if "layer 'fixed' draws random numbers" in text]
    assert len(said) == 1


@pytest.mark.parametrize(
    "layer", [lambda: Fixed(by_rows=False), lambda: keras.layers.Dropout(0.5, seed=1)]
)
def test_seeds_that_are_as_on_one_device_are_no_news(
    layer: Callable[[], keras.layers.Layer], caplog: pytest.LogCaptureFixture
) -> None:
    """X2: a projection that is fixed, and a layer whose seed goes on."""
    parallel = pk.DataParallelModel(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), layer()]), 3
    )
    parallel.compile(loss="mse")
    parallel.fit(np.zeros((6, 3)), np.zeros((6, 3)), verbose=0)
    assert not [text for text in caplog.messages if "constant seed" in text]
