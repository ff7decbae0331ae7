"""Whether verify finds what is not the same number as on one device, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.verifying import findings
from parallel_keras.verifying.layers import relative
from tests.parity import rng

ROWS, FEATURES = 7, 4


def batch(outputs: int = 2) -> tuple[np.ndarray, np.ndarray]:
    random = rng(5)
    x = random.normal(size=(ROWS, FEATURES)).astype("float32")
    return x, random.normal(size=(ROWS, outputs)).astype("float32")


def net(*layers: keras.layers.Layer) -> keras.Model:
    dense = [keras.layers.Dense(6, activation="tanh"), *layers, keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((FEATURES,)), *dense])


def verified(template: keras.Model, data: Any = None, **options: Any) -> Any:
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", **options})
    return pk.verify(parallel, data or batch())


class Spread(keras.layers.Layer):
    """The standard deviation of each feature over the rows, as one more feature."""

    def call(self, x: Any) -> Any:
        deviation = keras.ops.mean(keras.ops.std(x, axis=0))
        return keras.ops.concatenate([x, keras.ops.zeros_like(x[:, :1]) + deviation], axis=1)


class PastRows(keras.layers.Layer):
    """A bank of the last rows that were seen, whose mean is added."""

    def build(self, shape: Any) -> None:
        self.bank = self.add_weight(shape=(3, shape[-1]), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        out = x + keras.ops.mean(self.bank, axis=0)
        self.bank.assign(keras.ops.concatenate([self.bank, x], axis=0)[-3:])
        return out


class Deviation(keras.layers.Layer):
    """Notes the deviation of each feature over the rows, for someone to look at."""

    def build(self, shape: Any) -> None:
        self.last = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False, aggregation="mean"
        )

    def call(self, x: Any) -> Any:
        self.last.assign(keras.ops.std(x, axis=0))
        return x


class Balanced(keras.layers.Layer):
    """A switch with a term that balances how many rows go to each expert."""

    def build(self, shape: Any) -> None:
        self.router = self.add_weight(shape=(shape[-1], 2))

    def call(self, x: Any) -> Any:
        chances = keras.ops.softmax(x @ self.router)
        share = keras.ops.mean(keras.ops.one_hot(keras.ops.argmax(chances, 1), 2), axis=0)
        self.add_loss(keras.ops.sum(share * keras.ops.mean(chances, axis=0)))
        return x * keras.ops.max(chances, axis=1, keepdims=True)


class FromFirstBatch(keras.layers.Layer):
    """Scales by the deviation of the first batch that it sees."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        new = keras.ops.all(self.scale == 0)
        scale = keras.ops.where(new, keras.ops.std(x, axis=0) + 0.1, self.scale)
        self.scale.assign(scale)
        return x / scale


EQUAL = {
    "mlp": lambda: net(),
    "dropout": lambda: net(keras.layers.Dropout(0.5)),
    "layer norm": lambda: net(keras.layers.LayerNormalization()),
    "batch norm": lambda: net(keras.layers.BatchNormalization(synchronized=True)),
    "regularised": lambda: net(keras.layers.Dense(3, kernel_regularizer="l2")),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", EQUAL)
def test_finds_nothing_where_nothing_is(name: str) -> None:
    found = verified(EQUAL[name](), metrics=["mae"])
    assert found.equal, str(found)
    assert found.compared > 10
    assert "are the same" in str(found)
    assert bool(found.notes) == (name == "dropout")


def deep(*layers: keras.layers.Layer, blocks: int = 10) -> keras.Model:
    """Normalising 7 rows again and again amplifies rounding beyond that of a shallow net."""
    found = []
    for _ in range(blocks):
        normalise = keras.layers.BatchNormalization(synchronized=True, epsilon=1e-6)
        found += [keras.layers.Dense(6), normalise, keras.layers.ReLU()]
    return net(*found, *layers)


@pytest.mark.rest
def test_does_not_accuse_a_deep_net_of_rounding() -> None:
    found = verified(deep())
    assert found.equal, str(found)
    # Gradient, momentum, velocity and value of the biases that are taken away again.
    assert "numbers were not compared, such as 'train: gradient of" in found.notes[0]
    assert found.compared > 100


def test_what_cancels_hides_nothing() -> None:
    """What rounding alone makes in some numbers does not hide what is wrong in the others."""
    found = verified(deep(Balanced(), blocks=4))
    assert "such as 'train: gradient of" in found.notes[0]
    different = [one.what for one in found.differences if "gradient of" in one.what]
    assert len(different) >= 10, str(found)
    assert {one.kind for one in found.differences} == {findings.LOSS}
    assert 'loss_on="merged"' in str(found)


def test_looks_past_layers_that_talk_to_each_other() -> None:
    """What follows a normalisation of all rows is compared on what that gives on all devices."""
    found = verified(
        net(keras.layers.BatchNormalization(synchronized=True), Spread(name="culprit"))
    )
    assert {(one.layer, one.kind) for one in found.differences} == {
        ("culprit", findings.SEVERAL_ROWS)
    }


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (keras.layers.BatchNormalization, findings.BY_SHARD),
        (Spread, findings.SEVERAL_ROWS),
        (FromFirstBatch, findings.SEVERAL_ROWS),
    ],
)
def test_names_the_first_layer_that_differs(layer: Any, kind: str) -> None:
    """X13"""
    culprit = layer(name="culprit")
    found = verified(net(culprit, keras.layers.Dense(5)))
    assert not found.equal
    assert {(one.layer, one.kind) for one in found.differences} == {("culprit", kind)}
    assert any("gradient" in one.what for one in found.differences)
    assert all(one.size > one.allowed for one in found.differences)
    assert found.differences[0].remedy in str(found)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (PastRows, findings.REFUSED),
        (Deviation, findings.STATE),
        (Balanced, findings.LOSS),
    ],
)
def test_finds_what_only_state_or_the_loss_shows(layer: Any, kind: str) -> None:
    """X13"""
    found = verified(net(layer()))
    assert found.differences[0].kind == kind


class Pairs(keras.layers.Layer):
    """A similarity of all pairs of rows."""

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(x))


def test_a_refusal_is_a_finding() -> None:
    """X13: it says what the refusal says, and everything is put back."""
    template = keras.Sequential([keras.layers.Dense(6), Pairs()])
    found = verified(template, batch(ROWS))
    assert [(one.kind, one.size) for one in found.differences] == [(findings.REFUSED, np.inf)]
    assert "pairs of rows" in str(found)
    assert template.optimizer.iterations == 0


def test_text_without_a_length() -> None:
    """X13: shorter texts on one tower than on another."""
    words = keras.layers.TextVectorization(max_tokens=20)
    texts = np.array([["a b c d e f"], ["a"], ["b c"], ["c"], ["d e f a"], ["f"], ["a b"]])
    words.adapt(texts)
    inputs = keras.Input((1,), dtype="string")
    hidden = keras.layers.Embedding(20, 3)(words(inputs))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(hidden))
    found = verified(keras.Model(inputs, outputs), (tf.constant(texts), batch()[1]))
    assert not found.equal


def test_puts_everything_back() -> None:
    template = net(keras.layers.BatchNormalization(), keras.layers.Dropout(0.25))
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("adam", "mse", metrics=["mae"])
    x, y = batch()
    parallel.fit(x, y, batch_size=5, verbose=0)
    before = [np.array(v) for v in [*template.variables, *parallel.optimizer.variables]]
    pk.verify(parallel, (x, y))
    after = [np.array(v) for v in [*template.variables, *parallel.optimizer.variables]]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [layer.rate for layer in template.layers if hasattr(layer, "rate")] == [0.25]
    assert "apply" not in vars(parallel.optimizer)
    parallel.fit(x, y, batch_size=5, verbose=0)


def test_steps_of_the_models_own() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> Any:
            x, y = data[:2]
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    found = verified(Own())
    assert found.equal, str(found)
    assert "train: gradient of " in " ".join(_names(found)) or found.compared > 5


def _names(found: Any) -> list[str]:
    return [one.what for one in found.differences]


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"`parallel` to be a DataParallelModel.*Received: para"):
        pk.verify(net(), batch())
    with pytest.raises(ValueError, match=r"compiled model.*Received: parallel.compiled=False"):
        pk.verify(pk.DataParallelModel(net(), 2), batch())


@pytest.mark.parametrize(
    ("one", "other", "size"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0], [0.5], 0.5),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([1.0], [np.nan], np.inf),
        ([1, 2], [1, 2, 3], np.inf),
        ([True], [False], np.inf),
        ([np.inf], [np.inf], 0.0),
    ],
)
def test_relative(one: Any, other: Any, size: float) -> None:
    assert relative(np.array(one), np.array(other)) == size


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("synchronized", "code"), [(False, 1), (True, 0)])
def test_command(synchronized: bool, code: int, tmp_path: Path) -> None:
    template = net(keras.layers.BatchNormalization(synchronized=synchronized, name="norm"))
    template.compile("adam", "mse")
    template.save(tmp_path / "model.keras")
    done = subprocess.run(
        [sys.executable, "-m", "parallel_keras", "verify", "model.keras", "--devices=3", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(pk.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stderr
    said = json.loads(done.stdout)
    assert (said["rows"], len(said["devices"]), said["equal"]) == (7, 3, synchronized)
    assert {one["layer"] for one in said["differences"]} == (set() if synchronized else {"norm"})


def test_long_tables_are_cut() -> None:
    one = findings.Difference("x", "layer", 1.0, 0.1, findings.UNKNOWN, "ask")
    found = findings.Verification(False, (one,) * 23, 30, ("a", "b"), 5)
    assert str(found).count("layer  ") <= 22
    assert "and 3 more" in str(found)
