"""Floats that layers move by their rows are those of one device, or refused by name."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import parallel_keras as pk
from parallel_keras.towers.moving import Move, Moving
from tests.parity import assert_same_fit, batches, pair, rows

OPS = keras.ops
WIDTH = 4


class Moves(keras.layers.Layer):
    """Moves a variable by this function of its old value and the inputs `(batch, WIDTH)`."""

    def __init__(self, new: Callable[[Any, Any], Any], **options: Any) -> None:
        super().__init__()
        self.new, self.options = new, options

    def build(self, shape: Any) -> None:
        self.moved = self.add_weight(
            shape=(WIDTH,), initializer="ones", trainable=False, name="moved", **self.options
        )

    def call(self, x: Any) -> Any:
        old = self.moved + 0.0
        self.moved.assign(self.new(old, x))
        return x + 0.01 * old


# How a variable is moved, and what that is found to be.
KINDS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "moving sum": (lambda n, x: 0.9 * n + 0.1 * OPS.sum(x, axis=0), "sum"),
    "slow moving sum": (lambda n, x: 0.999 * n + 0.001 * OPS.sum(x**2, axis=0), "sum"),
    "sum": (lambda n, x: n + OPS.sum(x, axis=0), "sum"),
    "sum of the last batch": (lambda n, x: OPS.sum(x, axis=0), "sum"),
    "product": (lambda n, x: 0.5 * n + OPS.matmul(OPS.transpose(x), x)[0], "sum"),
    "counted": (lambda n, x: 0.9 * n + OPS.cast(OPS.shape(x)[0], "float32"), "sum"),
    "moving mean": (lambda n, x: 0.9 * n + 0.1 * OPS.mean(x, axis=0), "mean"),
    "mean of the last batch": (lambda n, x: OPS.mean(x**2, axis=0), "mean"),
    "largest ever": (lambda n, x: OPS.maximum(n, OPS.max(x, axis=0)), "max"),
    "largest of the last batch": (lambda n, x: OPS.max(x, axis=0), "max"),
    "smallest ever": (lambda n, x: OPS.minimum(n, OPS.min(x, axis=0)), "min"),
}


def moves(name: str, **options: Any) -> Callable[[], keras.Model]:
    """The layer stands behind others that are by shard or random."""
    new = KINDS[name][0]
    return lambda: keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(WIDTH, activation="tanh"),
            Moves(new, **options),
            keras.layers.Dense(2),
        ]
    )


@pytest.mark.sweep(3)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", KINDS)
def test_moved_by_rows(name: str, loss_on: str) -> None:
    """X10: moving sums, and what is the largest; batches of known and unknown sizes."""
    bare, parallel = pair(moves(name), 3, loss_on=loss_on, loss="mse", optimizer="sgd")
    assert_same_fit(bare, parallel, batches((7, 6, 1, 2, 6), rows(22, 3), rows(22, 2)), epochs=2)
    for model in (bare, parallel):
        model.train_on_batch(rows(6, 3), rows(6, 2))
    assert_same_fit(bare, parallel, rows(6, 3), rows(6, 2), batch_size=6)


@pytest.mark.parametrize("aggregation", ["sum", "mean", "none"])
def test_declarations(aggregation: str) -> None:
    """X10: a declared sum is one that its old value decays in, too."""
    name = "moving mean" if aggregation == "mean" else "moving sum"
    bare, parallel = pair(moves(name, aggregation=aggregation), 3, loss="mse", optimizer="sgd")
    assert_same_fit(bare, parallel, batches((7, 6, 2), rows(15, 3), rows(15, 2)), epochs=2)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("mode", ["run_eagerly", "jit_compile"])
@pytest.mark.parametrize("name", ["moving sum", "moving mean", "largest ever"])
def test_otherwise(name: str, mode: str) -> None:
    """X10: without a graph, and by XLA."""
    bare, parallel = pair(moves(name), 3, loss="mse", optimizer="sgd", **{mode: True})
    assert_same_fit(bare, parallel, rows(13, 3), rows(13, 2), batch_size=6)


INTEGERS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "rows": ("int32", lambda n, x: n + OPS.shape(x)[0]),
    "steps": ("int32", lambda n, x: n + 1),
    "positive": ("int64", lambda n, x: n + OPS.sum(OPS.cast(x > 0, "int64"), axis=0)),
    "largest": ("int32", lambda n, x: OPS.maximum(n, OPS.max(OPS.cast(9 * x, "int32"), axis=0))),
    "any": ("bool", lambda n, x: OPS.logical_or(n, OPS.any(x > 0.5, axis=0))),
    "all": ("bool", lambda n, x: OPS.logical_and(n, OPS.all(x > -0.9, axis=0))),
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, eager: bool) -> None:
    """X10: what is counted, and what is the largest or any; towers with as many rows, too."""
    dtype, new = INTEGERS[name]

    class Counts(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            start = "ones" if dtype == "bool" else "zeros"
            self.moved = self.add_weight(
                shape=(3,), initializer=start, trainable=False, dtype=dtype, name="moved"
            )

        def call(self, x: Any) -> Any:
            self.moved.assign(new(self.moved, x))
            return x

    models = pair(
        lambda: keras.Sequential([keras.Input((3,)), Counts(), keras.layers.Dense(2)]),
        3,
        loss="mse",
        optimizer="sgd",
        run_eagerly=eager,
    )
    for count in (6, 7):
        for model in models:
            model.train_on_batch(rows(count, 3), rows(count, 2))
        counted = [getattr(model, "template", model).layers[0].moved.numpy() for model in models]
        np.testing.assert_array_equal(counted[1], counted[0])


def test_integers_that_parts_cannot_move() -> None:
    """X10: a place in a ring."""

    class Ring(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.place = self.add_weight(shape=(), dtype="int32", trainable=False, name="place")

        def call(self, x: Any) -> Any:
            self.place.assign((self.place + OPS.shape(x)[0]) % 8)
            return x

    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((3,)), Ring()]), 3)
    with pytest.raises(ValueError, match=r"place' is made of the rows in a way that parts"):
        parallel(rows(7, 3))


class Codebook(keras.layers.Layer):
    """Vectors that follow the inputs nearest to them, by moving sums of counts and inputs."""

    def __init__(self, *, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns

    def build(self, shape: Any) -> None:
        def variable(name: str, shape: tuple[int, ...], start: str) -> keras.Variable:
            return self.add_weight(shape=shape, initializer=start, trainable=False, name=name)

        self.counts = variable("counts", (5,), "ones")
        self.sums = variable("sums", (5, WIDTH), keras.initializers.RandomNormal(seed=1))
        if self.assigns:
            self.vectors = variable("vectors", (5, WIDTH), keras.initializers.RandomNormal(seed=1))

    def call(self, x: Any, training: bool = False) -> Any:
        vectors = self.vectors if self.assigns else self.sums / self.counts[:, None]
        vectors = vectors + 0.0
        distances = OPS.sum((x[:, None] - vectors[None]) ** 2, axis=-1)
        nearest = OPS.one_hot(OPS.argmin(distances, axis=-1), 5)
        if training:
            self.counts.assign(0.95 * self.counts + 0.05 * OPS.sum(nearest, axis=0))
            gathered = OPS.matmul(OPS.transpose(nearest), x)
            self.sums.assign(0.95 * self.sums + 0.05 * gathered)
            if self.assigns:
                self.vectors.assign(self.sums / self.counts[:, None])
        return x + OPS.stop_gradient(OPS.matmul(nearest, vectors) - x)


def quantised(*, assigns: bool) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(WIDTH),
            Codebook(assigns=assigns),
            keras.layers.Dense(2),
        ]
    )


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_codebooks(loss_on: str) -> None:
    """X10: the vector quantiser whose codebook is a moving mean of what is nearest."""
    bare, parallel = pair(
        lambda: quantised(assigns=False), 3, loss_on=loss_on, loss="mse", optimizer="sgd"
    )
    assert_same_fit(bare, parallel, batches((7, 6, 2), rows(15, 3), rows(15, 2)), epochs=2)


def test_what_parts_of_the_batch_cannot_move_is_refused() -> None:
    """X10: a quotient of sums; the message says to keep the sums."""
    _, parallel = pair(lambda: quantised(assigns=True), 3, loss="mse", optimizer="sgd")
    with pytest.raises(
        ValueError, match=r"vectors' is made of the rows.*rules=\{\"vectors\": \"me"
    ):
        parallel.fit(rows(7, 3), rows(7, 2), verbose=0)
    _, parallel = pair(
        lambda: quantised(assigns=True), 3, rules={"vectors": "mean"}, loss="mse", optimizer="sgd"
    )
    parallel.fit(rows(7, 3), rows(7, 2), verbose=0)


def test_other_ways_to_move() -> None:
    """X10: what neither a sum nor a mean is: a variance, a queue of rows, the last row."""
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "variance": lambda n, x: 0.9 * n + 0.1 * OPS.var(x, axis=0),
        "length": lambda n, x: 0.9 * n + 0.1 * OPS.sqrt(OPS.sum(x**2, axis=0)),
        "first row": lambda n, x: x[0],
        "last row": lambda n, x: x[-1],
        # What is nearly the old value hides what it moves by.
        "slow variance": lambda n, x: 0.9999 * n + 0.0001 * OPS.var(x, axis=0),
        "slow product": lambda n, x: n * OPS.prod(1 + 0.01 * x, axis=0),
        "bounded": lambda n, x: OPS.clip(OPS.mean(x, axis=0), -0.3, 0.3),
    }
    for name, new in functions.items():
        layer = Moves(new)
        template = keras.Sequential([keras.Input((WIDTH,)), layer])
        parallel = pk.DataParallelModel(template, 3)
        with pytest.raises(ValueError, match="is made of the rows in a way that parts"):
            parallel(rows(6, WIDTH))
        assert name


def test_what_cannot_be_tried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """X10: random layers inside give no answer; then it is a mean, and the log says so."""
    drop = keras.layers.Dropout(0.5)
    layer = Moves(lambda n, x: 0.9 * n + 0.1 * OPS.sum(drop(x, training=True), axis=0))
    layer.drop = drop
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((WIDTH,)), layer]), 3)
    parallel(rows(6, WIDTH))
    assert [r for r in caplog.records if "could not be found out how" in r.message]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_found_out(name: str) -> None:
    """X10: from a few random rows."""
    template = moves(name)()
    moving, layer = Moving(template), template.layers[1]
    assert moving.move(layer.moved) == Move("unknown")
    moving = Moving(template)
    with moving.noting_calls():
        template(np.ones((2, 3), "float32"))
    assert moving.move(layer.moved).kind == KINDS[name][1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_is_no_reason_to_find_nothing_out(policy: str) -> None:
    """X10: what is rounded to a few digits looks as if no rule were right."""
    for name in ("moving sum", "moving mean", "largest ever"):
        layer = Moves(KINDS[name][0])
        layer.dtype_policy = policy
        template = keras.Sequential([keras.Input((WIDTH,)), layer])
        moving = Moving(template)
        with moving.noting_calls():
            template(np.ones((2, WIDTH), "float32"))
        assert moving.move(layer.moved).kind == KINDS[name][1]
        assert layer.dtype_policy.name == policy


def test_models_that_move_nothing_pay_nothing() -> None:
    """X10: nothing is put around their layers."""
    layer = keras.layers.BatchNormalization()
    template = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(2)])
    with Moving(template).noting_calls():
        assert not any("call" in vars(layer) for layer in template.layers)
