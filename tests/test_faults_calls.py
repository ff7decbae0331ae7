"""Calls that are differentiated once, later, or not at all; and calls beside a training step."""

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.towers import run
from tests.parity import (
    ATOL,
    RTOL,
    assert_same_fit,
    assert_same_variables,
    pair,
    rng,
    rows,
)

STEPS, CLASSES = 6, 5


class ReadsOut(keras.layers.Layer):
    """The layer of the captcha reader: adds the CTC loss of its targets, returns its inputs."""

    def call(self, logits: Any, targets: Any) -> Any:
        count = keras.ops.shape(logits)[0]
        lengths = [keras.ops.full((count,), size, "int32") for size in (2, STEPS)]
        self.add_loss(keras.ops.mean(keras.ops.ctc_loss(targets, logits, *lengths)))
        return logits


def reader(kind: type[keras.Model] = keras.Model) -> keras.Model:
    images, targets = keras.Input((STEPS, 4)), keras.Input((2,), dtype="int32")
    logits = keras.layers.Dense(CLASSES)(keras.layers.Dense(7, activation="tanh")(images))
    return kind([images, targets], ReadsOut()(logits, targets))


def captchas(count: int) -> list[np.ndarray]:
    return [rows(count, STEPS, 4), rng(1).integers(1, CLASSES, (count, 2)).astype("int32")]


class Once(keras.layers.Layer):
    """An operation that has a gradient, which itself has none."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.how = name

    def call(self, x: Any) -> Any:
        if self.how == "local response":
            return tf.nn.local_response_normalization(x)
        if self.how == "bicubic":
            return tf.image.resize(x, (6, 6), method="bicubic")
        boxes = tf.tile([[0.1, 0.1, 0.8, 0.9]], [tf.shape(x)[0], 1])
        return tf.image.crop_and_resize(x, boxes, tf.range(tf.shape(x)[0]), (3, 3))


def once(name: str, kind: type[keras.Model] = keras.Model) -> keras.Model:
    inputs = keras.Input((4, 4, 2))
    x = Once(name)(keras.layers.Conv2D(3, 1)(inputs))
    return kind(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [OwnStep, keras.Model])
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_ctc_inside_of_a_model(loss_on: str, kind: type[keras.Model]) -> None:
    """X17: its derivative has none."""
    bare, parallel = pair(lambda: reader(kind), 3, loss_on=loss_on, optimizer="adam")
    assert_same_fit(bare, parallel, captchas(13), batch_size=7, epochs=2)


@pytest.mark.parametrize("kind", [keras.Model, OwnStep])
@pytest.mark.parametrize("name", ["local response", "bicubic", "crop"])
def test_operations_with_one_derivative(name: str, kind: type[keras.Model]) -> None:
    """X17: others of this kind."""
    bare, parallel = pair(
        lambda: once(name, kind), 3, loss_on="merged", loss="mse",
        optimizer=lambda: keras.optimizers.SGD(0.1),
    )  # fmt: skip
    assert_same_fit(bare, parallel, rows(13, 4, 4, 2), rows(13, 2), batch_size=7)


@pytest.mark.parametrize("in_function", [False, True])
def test_a_tape_of_ones_own(in_function: bool) -> None:
    """X17: outside of any step, in a function or not."""
    model = once("local response")
    parallel, x = pk.DataParallelModel(model, 3), tf.constant(rows(7, 4, 4, 2))

    def gradients(called: keras.Model) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(called(x) ** 2)
        return tape.gradient(loss, [x, *(v.value for v in model.trainable_variables)])

    take = tf.function(gradients, autograph=False) if in_function else gradients
    for one, other in zip(take(model), take(parallel), strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


def test_tapes_that_go_further() -> None:
    """X17: persistent tapes, and tapes over tapes, need what a single one does not."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh")])
    parallel, x = pk.DataParallelModel(model, 3), tf.constant(rows(7, 3))
    kernel = model.layers[0].kernel.value

    def twice(called: keras.Model) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = called(x)
            first, second = tf.reduce_sum(y**2), tf.reduce_sum(y**3)
        return [
            tape.gradient(first, kernel),
            tape.gradient(second, kernel),
            tape.gradient(first, x),
        ]

    def penalty(called: keras.Model) -> Any:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(called(x) ** 2)
            size = tf.reduce_sum(tape.gradient(y, x) ** 2)
        return [outer.gradient(size, kernel)]

    for take in (twice, penalty):
        for wrapped in (take, tf.function(take, autograph=False)):
            for one, other in zip(wrapped(model), wrapped(parallel), strict=True):
                np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


WORDS = ["one", "two", "three"]
# No floats anywhere, or no weights; an operation that has no gradient.
FORWARD: dict[str, tuple[Callable[[], keras.Model], np.ndarray]] = {
    "lookup": (
        lambda: keras.Sequential(
            [keras.Input((1,), dtype="string"), keras.layers.StringLookup(vocabulary=WORDS)]
        ),
        np.array([["two"], ["one"], ["four"], ["three"], ["one"]]),
    ),
    "hashing": (
        lambda: keras.Sequential([keras.Input((1,), dtype="int64"), keras.layers.Hashing(7)]),
        np.arange(5)[:, None],
    ),
    "categories": (
        lambda: keras.Sequential(
            [keras.Input((1,), dtype="int32"), keras.layers.CategoryEncoding(5)]
        ),
        np.arange(5, dtype="int32")[:, None],
    ),
    "largest": (
        lambda: keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4),
                keras.layers.Lambda(lambda x: keras.ops.argmax(x, axis=-1)),
            ]
        ),
        rows(5, 3),
    ),
    "spectrogram": (
        lambda: keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(8),
                keras.layers.Lambda(
                    lambda x: tf.transpose(
                        tf.raw_ops.AudioSpectrogram(input=tf.transpose(x), window_size=4, stride=2),
                        (0, 1, 2),
                    )
                ),
            ]
        ),
        rows(5, 8),
    ),
    "hue": (
        lambda: keras.Sequential(
            [
                keras.Input((4, 4, 3)),
                keras.layers.Conv2D(3, 1, activation="sigmoid"),
                keras.layers.Lambda(lambda x: tf.image.adjust_hue(x, 0.1)),
            ]
        ),
        rows(5, 4, 4, 3),
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_passes(name: str) -> None:
    """X19: no gradient is asked for, so none is needed."""
    build, x = FORWARD[name]
    template = build()
    parallel = pk.DataParallelModel(template, 3)
    data = tf.constant(x)
    in_function = tf.function(lambda: parallel(data), autograph=False)
    expected = template(data)
    for call in (lambda: parallel(data), in_function, lambda: parallel.predict_on_batch(data)):
        np.testing.assert_allclose(call(), expected, rtol=RTOL, atol=ATOL)
    parallel.compile("sgd", "mse", run_eagerly=True)
    np.testing.assert_allclose(parallel(data), expected, rtol=RTOL, atol=ATOL)


def test_what_has_no_gradient_is_told_when_it_is_asked_for() -> None:
    """X19: the same error as on one device."""
    template = FORWARD["hue"][0]()
    parallel, x = pk.DataParallelModel(template, 3), tf.constant(rows(5, 4, 4, 3))

    def gradient(called: keras.Model) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(called(x))
        return tape.gradient(loss, template.trainable_variables[0].value)

    for model in (template, parallel):
        for take in (gradient, tf.function(gradient, autograph=False)):
            with pytest.raises(LookupError, match=r"(No gradient defined|no entry) for"):
                take(model)
    traced = tf.function(parallel, autograph=False)
    traced(x)
    with pytest.raises(LookupError, match=r"(No gradient defined|no entry) for"):
        gradient(traced)


@pytest.mark.parametrize("kind", ["Maximum", "Minimum", "Multiply", "Add", "Subtract"])
def test_layers_of_two_sparse_inputs(kind: str) -> None:
    """X26: only a forward pass is asked for."""
    inputs = [keras.Input((6,), sparse=True, name=name) for name in "ab"]
    template = keras.Model(inputs, getattr(keras.layers, kind)()(inputs))
    parallel = pk.DataParallelModel(template, 3)
    arrays = [rows(7, 6, seed=seed) * (rng(seed).random((7, 6)) < 0.4) for seed in (0, 1)]
    x = [tf.sparse.from_dense(array) for array in arrays]
    expected = keras.ops.convert_to_numpy(template(x))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(parallel(x)), expected, rtol=RTOL)
    in_function = tf.function(lambda: tf.sparse.to_dense(parallel(x)), autograph=False)
    np.testing.assert_allclose(in_function(), expected, rtol=RTOL)


class OfSparse(keras.Model):
    """Not built yet, and looks at what is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(tf.ensure_shape(tf.sparse.to_dense(keras.ops.maximum(x, x)), (None, 6)))


def test_a_model_that_a_sparse_batch_builds() -> None:
    """X26: from its spec, as a data set has it."""
    x, y = rows(7, 6), rows(7, 2)
    sparse = tf.sparse.from_dense(x * (x > 0.5))
    data = tf.data.Dataset.from_tensor_slices((sparse, y)).batch(4)
    bare, parallel = pair(OfSparse, 3, optimizer="sgd", loss="mse")
    assert_same_fit(bare, parallel, data)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantised_layers(mode: str) -> None:
    """X26: only a forward pass is asked for."""
    template = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, name="dense")])
    template.layers[0].quantize(mode)
    parallel, x = pk.DataParallelModel(template, 3), rows(7, 6)
    expected = template(x)
    np.testing.assert_allclose(parallel(x), expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(
        tf.function(lambda: parallel(x), autograph=False)(), expected, rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_float8_layers_are_trained(loss_on: str) -> None:
    """X26: what their scales are made of is the largest value of the whole batch."""

    def float8() -> keras.Model:
        model = keras.Sequential([keras.Input((6,)), *map(keras.layers.Dense, (4, 2))])
        for layer in model.layers:
            layer.quantize("float8")
        return model

    x, y = rows(7, 6), rows(7, 2)
    bare, parallel = pair(float8, 3, loss_on=loss_on, optimizer="sgd", loss="mse")
    losses = [
        model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False).history["loss"]
        for model in (bare, parallel)
    ]
    # A sum that is rounded otherwise may be the next of only 256 numbers.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    for one, other in zip(bare.variables, parallel.template.variables, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3, err_msg=one.path)
    assert bare.layers[0].inputs_scale.numpy() != 1


def test_float8_layers_on_several_machines_are_refused() -> None:
    """X26: gradients of machines are added up."""
    with pytest.raises(ValueError, match=r"float8.*dense/inputs_scale, on 2 machines"):
        run.check_one_machine(["dense/inputs_scale"], 2)


class Meanwhile(pk.DataParallelModel):
    """Does something else, once, in another thread, before its forward pass."""

    work: Callable[[], None] | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        work, self.work = self.work, None
        if work is not None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(100)
            assert not thread.is_alive()
        return super().call(*args, **kwargs)


def test_a_call_while_another_thread_trains() -> None:
    """X22: each thread has steps of its own."""
    x, y = rows(7, 3), rows(7, 2)
    template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    start = template.get_weights()
    parallel, answers = Meanwhile(template, 3, loss_on="merged"), []
    parallel.compile("sgd", "mse")
    expected = template.predict(x, verbose=0)
    parallel.work = lambda: answers.append(parallel(x).numpy())
    parallel.train_on_batch(x, y)
    np.testing.assert_allclose(answers[0], expected, rtol=RTOL, atol=ATOL)
    trained = template.get_weights()
    template.set_weights(start)
    template.compile("sgd", "mse")
    template.train_on_batch(x, y)
    for one, other in zip(template.get_weights(), trained, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


class ByPhase(keras.layers.Layer):
    """Does something else in training, which is a tensor, and looks at the batch."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)

    def call(self, x: tf.Tensor, training: Any = False) -> tf.Tensor:
        phase = tf.cast(training, tf.bool)
        mean = keras.ops.mean(x, axis=0)
        self.mean.assign(tf.where(phase, 0.9 * self.mean + 0.1 * mean, self.mean))
        self.add_loss(0.1 * keras.ops.mean(x**2))
        return tf.cond(phase, lambda: 2 * x, lambda: x - self.mean)


@pytest.mark.parametrize("traced", [True, False])
def test_the_phase_is_a_tensor(traced: bool) -> None:
    """Nobody can be asked then how a model joins its rows, before the step runs."""
    template = keras.Sequential([keras.Input((4,)), ByPhase(), keras.layers.Dense(2)])
    bare = keras.Sequential([keras.Input((4,)), ByPhase(), keras.layers.Dense(2)])
    bare.set_weights(template.get_weights())
    parallel = pk.DataParallelModel(template, 3)
    signature = [tf.TensorSpec((None, 4)), tf.TensorSpec((), tf.bool)]
    calls = [
        tf.function(call, input_signature=signature) if traced else call
        for call in (
            lambda x, phase: bare(x, training=phase),
            lambda x, phase: parallel(x, training=phase),
        )
    ]
    for size, phase in ((7, True), (2, True), (7, False)):
        theirs, mine = (call(tf.constant(rows(size, 4)), tf.constant(phase)) for call in calls)
        np.testing.assert_allclose(mine, theirs, rtol=RTOL, atol=ATOL)
        assert_same_variables(bare, parallel)
        if not traced:
            np.testing.assert_allclose(parallel.losses, bare.losses, rtol=RTOL, atol=ATOL)
