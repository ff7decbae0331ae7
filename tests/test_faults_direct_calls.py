"""Faults found by running real programs bare and wrapped: calls outside of any step.

The id above each test is that of the kind of fault.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.steps import python_state
from tests.parity import ATOL, RTOL, pair, rows

TOWERS = [1, 3]
SCALE = {"by": 1.0}


class Scales(keras.layers.Layer):
    """Reads what Python has: an attribute, a list, an object, a closure, a global."""

    def __init__(self, by: Callable[[], float]) -> None:
        super().__init__()
        self.alpha, self.steps, self.other, self.by = 1.0, [1.0, 2.0], Plain(), by

    def call(self, x: Any) -> Any:
        return x * self.alpha * self.steps[-1] * self.other.beta * self.by() * SCALE["by"]


class Plain:
    beta = 3.0


def forward_and_gradient(model: Any, x: Any, **given: Any) -> list[Any]:
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, **given)
    return [y, tape.gradient(y, x)]


def assert_same(parallel: Any, template: Any, x: Any, **given: Any) -> None:
    expected = forward_and_gradient(template, x, **given)
    for one, other in zip(forward_and_gradient(parallel, x, **given), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=RTOL, atol=ATOL)


def custom() -> tuple[keras.Model, list[Callable[[], None]]]:
    held = [1.0]
    layer = Scales(lambda: held[0])
    template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), layer])

    def outside() -> None:
        SCALE["by"] = 0.5

    return template, [
        lambda: setattr(layer, "alpha", 0.5),
        lambda: layer.steps.append(7.0),
        lambda: setattr(layer.other, "beta", 1.5),
        lambda: held.__setitem__(0, -1.0),
        outside,
    ]


def of_keras() -> tuple[keras.Model, list[Callable[[], None]]]:
    norm, dense = keras.layers.Normalization(), keras.layers.Dense(2, activation="tanh")
    scale, drop = keras.layers.Rescaling(2.0), keras.layers.Dropout(1e-9)
    leaky = keras.layers.LeakyReLU(0.1)
    template = keras.Sequential([keras.Input((3,)), norm, dense, scale, leaky, drop])
    norm.adapt(rows(20, 3))

    def zero_rate() -> None:
        drop.rate = 0.999999  # with training=True all but surely nothing is left

    return template, [
        lambda: norm.adapt(5 + 2 * rows(20, 3, seed=3)),
        lambda: setattr(dense, "activation", keras.activations.relu),
        lambda: setattr(dense, "activation", lambda x: x * 3.0),
        lambda: setattr(scale, "scale", -0.5),
        lambda: setattr(leaky, "negative_slope", 0.9),
        lambda: setattr(dense, "use_bias", False),
        zero_rate,
    ]


def recurrent() -> tuple[keras.Model, list[Callable[[], None]]]:
    layer = keras.layers.GRU(4, activation="tanh")
    template = keras.Sequential(
        [keras.Input((3,)), keras.layers.Reshape((3, 1)), layer, keras.layers.Dense(2)]
    )
    return template, [
        lambda: setattr(layer.cell, "activation", keras.activations.sigmoid),
        lambda: setattr(layer, "go_backwards", True),
    ]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("build", [custom, of_keras, recurrent])
def test_a_call_does_what_python_says_now(build: Any, towers: int) -> None:
    """X8: an attribute that changed, a layer that was adapted, an activation exchanged."""
    SCALE["by"] = 1.0
    template, changes = build()
    parallel = pk.DataParallelModel(template, towers)
    for given in ({}, {"training": True}):
        assert_same(parallel, template, rows(7, 3), **given)
    for change in changes:
        change()
        for count in (7, 2, 5):
            for given in ({}, {"training": True}):
                assert_same(parallel, template, rows(count, 3, seed=count), **given)


def test_what_is_traced_is_kept_while_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """X8: a call in a loop costs no trace where it is known what code reads; else one."""
    calls: list[Any] = []

    class Counts(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            calls.append(x)
            return x + 1

    x = rows(7, 3)
    template, _ = of_keras()
    parallel = pk.DataParallelModel(template, 3)
    for size in (7, 5, 6):
        parallel(x[:size])
    kept = [traced.function for traced in parallel._runtime.calls._direct._traced.values()]
    assert len(kept) == 1
    before = kept[0].experimental_get_tracing_count()
    for _ in range(5):
        parallel(x)
    assert [t.function for t in parallel._runtime.calls._direct._traced.values()] == kept
    assert kept[0].experimental_get_tracing_count() == before

    SCALE["by"] = 1.0
    template, _ = custom()
    parallel = pk.DataParallelModel(template, 3)
    parallel(x)
    monkeypatch.setattr(python_state, "graph", None)  # Nothing is traced once more.
    parallel(x[:5])
    monkeypatch.undo()

    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((3,)), Counts()]), 3)
    parallel(x)
    calls.clear()
    for _ in range(5):
        parallel(x)
    assert len(calls) == 5  # as on one device, and not once for each of the towers


@pytest.mark.parametrize("towers", TOWERS)
def test_the_first_trace_of_each_kind_of_step_reads_python_anew(towers: int) -> None:
    """X8: Keras keeps the function of `predict`; that of `evaluate` is another one."""

    def build() -> keras.Model:
        layer = Scales(lambda: 1.0)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), layer])

    SCALE["by"] = 1.0
    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(build, towers, optimizer="sgd", loss="mse")
    for alpha in (1.0, 0.5, 0.25):
        for model in (bare, parallel):
            model.layers[-1].alpha = alpha
        same = [m.predict(x, verbose=0) for m in (bare, parallel)]
        np.testing.assert_allclose(same[1], same[0], rtol=RTOL, atol=ATOL)
        if alpha < 1:
            losses = [m.evaluate(x, y, verbose=0) for m in (bare, parallel)]
            np.testing.assert_allclose(losses[1], losses[0], rtol=RTOL, atol=ATOL)
            losses = [m.predict(x[:3], batch_size=3, verbose=0) for m in (bare, parallel)]
            np.testing.assert_allclose(losses[1], losses[0], rtol=RTOL, atol=ATOL)


class InNumPy(keras.layers.Layer):
    """Only runs eagerly: it asks for the numbers."""

    def call(self, x: Any) -> Any:
        largest = float(np.asarray(x).max(axis=-1).min())
        return x * x.shape[1] + tf.constant(np.sort(np.asarray(x))) + 0.0 * largest


class EagerOnly(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.sort = keras.layers.Dense(2), InNumPy()
        self.norm = keras.layers.LayerNormalization()

    def call(self, x: Any) -> Any:
        y = self.dense(self.sort(x))
        if float(tf.reduce_sum(y)) > 1e9:
            return y
        return self.norm(y)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_models_that_only_run_eagerly(loss_on: str, towers: int) -> None:
    """X20: nothing of such a model is traced, also not to find out what metrics need."""
    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(
        EagerOnly,
        towers,
        loss_on=loss_on,
        optimizer="adam",
        loss="mse",
        metrics=["mae", "accuracy"],
        run_eagerly=True,
    )
    for model in (bare, parallel):
        keras.utils.set_random_seed(3)
        model(x)
    histories = [
        m.fit(
            x, y, batch_size=3, epochs=2, shuffle=False, verbose=0, validation_data=(x, y)
        ).history
        for m in (bare, parallel)
    ]
    assert list(histories[0]) == list(histories[1])
    for name, values in histories[0].items():
        np.testing.assert_allclose(histories[1][name], values, rtol=RTOL, atol=ATOL)
    for ask in (
        lambda m: m.evaluate(x, y, verbose=0),
        lambda m: m.predict(x, batch_size=4, verbose=0),
        lambda m: m.train_on_batch(x, y),
        lambda m: m(x),
    ):
        np.testing.assert_allclose(ask(parallel), ask(bare), rtol=RTOL, atol=ATOL)


def test_uncompiled_calls_of_models_that_only_run_eagerly(caplog: Any) -> None:
    """X20: built by the first call, with gradients, and the log says what it costs."""
    x = rows(7, 3)
    template = EagerOnly()
    parallel = pk.DataParallelModel(template, 3)
    with caplog.at_level("WARNING", logger="absl"):
        first = parallel(x)
        np.testing.assert_allclose(first, template(x), rtol=RTOL, atol=ATOL)
        assert_same(parallel, template, x)
    assert len([r for r in caplog.records if "one tower after the other" in r.message]) == 1


def test_errors_of_a_model_are_its_own() -> None:
    """X20: what fails on one device too is told as it is there."""

    class Wrong(keras.Model):
        def call(self, x: Any) -> Any:
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        pk.DataParallelModel(Wrong(), 3)(rows(7, 3))
