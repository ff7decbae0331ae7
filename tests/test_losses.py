"""The loss of a step, on the towers and of the merged batch, beside one device."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.towers import losses
from parallel_keras.towers.losses import ACTIVITY_RULE
from tests.parity import (
    assert_same_fit,
    mlp,
    pair,
    rng,
    row_wise,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


def in_batch_softmax(y_true: Any, y_pred: Any) -> Any:
    """N9: every other row of the batch is a negative."""
    logits = keras.ops.matmul(y_true, keras.ops.transpose(y_pred))
    labels = keras.ops.arange(keras.ops.shape(logits)[0])
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


class Quartic(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


# What the loss is, and whether the towers take it under loss_on="auto" and "towers".
LOSSES = {
    "mse": (lambda: "mse", True, True),
    "function": (lambda: keras.losses.mean_absolute_error, True, True),
    "mean": (lambda: keras.losses.Huber(), True, True),
    "mean by name": (lambda: keras.losses.LogCosh(reduction="mean"), True, True),
    "sum": (lambda: keras.losses.MeanSquaredError(reduction="sum"), True, True),
    "weights": (
        lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        False,
        False,
    ),
    "none": (lambda: keras.losses.MeanSquaredError(reduction=None), False, False),
    "cosine": (lambda: keras.losses.CosineSimilarity(), True, True),
    "cosine over rows": (lambda: keras.losses.CosineSimilarity(axis=0), False, False),
    "dice": (lambda: keras.losses.Dice(), False, False),
    "tversky": (lambda: keras.losses.Tversky(), False, False),
    "own function": (lambda: row_wise, False, True),
    "own class": (lambda: Quartic(), False, True),
    "own class, sum": (lambda: Quartic(reduction="sum"), False, True),
    "in-batch softmax": (lambda: in_batch_softmax, False, None),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, weighted: bool) -> None:
    """N3, N9, N12: which path a loss takes, and that all paths agree."""
    make, auto_on_towers, towers_allowed = LOSSES[name]
    weighted = weighted and name != "cosine over rows"  # one number a column: rows have no weight
    x, y = rows(10, 6), abs(rows(10, 3, seed=1))
    extra = {"sample_weight": rng(3).random(10).astype("float32")} if weighted else {}
    for loss_on in ("auto", "merged", "towers"):
        bare, parallel = pair(mlp, 4, loss_on=loss_on, loss=make, **SGD)
        if loss_on == "towers" and towers_allowed is False:
            with pytest.raises(ValueError, match="is not the sum of the losses of its parts"):
                parallel.fit(x, y, verbose=0)
        elif loss_on != "towers" or towers_allowed:
            on_towers = auto_on_towers if loss_on == "auto" else loss_on == "towers"
            assert (parallel.loss_path.reduction is not None) == on_towers
            assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2, **extra)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_class_weight(loss_on: str) -> None:
    """N12: https://github.com/tensorflow/tensorflow/issues/41290."""
    x, y = rows(10, 6), rng(1).integers(0, 3, 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    bare, parallel = pair(mlp, 4, loss_on=loss_on, loss=loss, weighted_metrics=["accuracy"], **SGD)
    assert_same_fit(
        bare, parallel, x, y, batch_size=7, epochs=2, class_weight={0: 0.1, 1: 2.0, 2: 1.0}
    )


def summed(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(keras.ops.square(y_true - y_pred))


@pytest.mark.parametrize(
    ("loss", "said"),
    [(summed, "taken for the mean"), (Quartic(reduction="sum"), "taken for the sum"), ("mae", "")],
)
def test_what_towers_only_assume_is_said(
    loss: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """X9: a function that sums is another number there, and nothing can know it."""
    parallel = pk.DataParallelModel(mlp(), 3, loss_on="towers")
    parallel.compile("sgd", loss)
    parallel.train_on_batch(rows(7, 6), rows(7, 3, seed=1))
    found = [text for text in caplog.messages if "taken for the" in text]
    assert len(found) == bool(said)
    assert not said or said in found[0]


def masked() -> keras.Model:
    tokens = keras.Input((7,), dtype="int32")
    hidden = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    hidden = keras.layers.LSTM(6, return_sequences=True)(hidden)
    return keras.Model(tokens, keras.layers.Dense(4)(hidden))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("weighted", [True, False])
def test_masks_reach_the_loss(weighted: bool) -> None:
    x = rng().integers(0, 4, (10, 7)).astype("int32")
    y = rng(1).integers(0, 4, (10, 7))
    extra = {"sample_weight": rng(3).random((10, 7)).astype("float32")} if weighted else {}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    bare, parallel = pair(masked, 4, loss=loss, metrics=["accuracy"], **SGD)
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2, **extra)


def test_masked_loss_is_refused_on_towers() -> None:
    x, y = rng().integers(0, 4, (10, 7)).astype("int32"), rng(1).integers(0, 4, (10, 7))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    _, parallel = pair(masked, 4, loss_on="towers", loss=loss, **SGD)
    with pytest.raises(ValueError, match="has a mask"):
        parallel.fit(x, y, verbose=0)


def two_outputs() -> keras.Model:
    inputs = keras.Input((6,), name="x")
    a = keras.layers.Dense(3, name="a")(inputs)
    b = keras.layers.Dense(2, name="b", activation="softmax")(inputs)
    return keras.Model(inputs, {"a": a, "b": b})


def two_outputs_in_a_list() -> keras.Model:
    model = two_outputs()
    return keras.Model(model.inputs[0], [model.outputs[0], model.outputs[1]])


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("structure", ["dict", "list"])
def test_several_outputs(structure: str, loss_on: str) -> None:
    """C2: names in loss, loss_weights, metrics and History are the template's.

    https://github.com/keras-team/keras/issues/8512
    """
    a, b = rows(10, 3, seed=1), rng(2).integers(0, 2, 10)
    weights = rng(3).random(10).astype("float32")
    as_given = (
        (lambda one, two: {"a": one, "b": two}) if structure == "dict" else lambda *two: list(two)
    )
    bare, parallel = pair(
        two_outputs if structure == "dict" else two_outputs_in_a_list,
        3,
        loss_on=loss_on,
        loss=as_given("mse", "sparse_categorical_crossentropy"),
        loss_weights=as_given(0.3, 2.0),
        metrics=as_given(["mae"], ["accuracy"]),
        weighted_metrics=as_given(["mse"], []),
        **SGD,
    )
    assert_same_fit(
        bare,
        parallel,
        rows(10, 6),
        as_given(a, b),
        batch_size=7,
        epochs=2,
        sample_weight=as_given(weights, weights[::-1].copy()),
    )


def test_output_without_loss() -> None:
    x, a = rows(10, 6), rows(10, 3, seed=1)
    bare, parallel = pair(two_outputs, 3, loss={"a": "mse", "b": None}, **SGD)
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        assert_same_fit(bare, parallel, x, {"a": a, "b": a[:, :2]}, batch_size=7, epochs=2)


class AddsLoss(keras.layers.Layer):
    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.reduce = reduce

    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.add_loss(0.1 * self.reduce(keras.ops.square(x)))
        return x


def regularised(reduce: Any = keras.ops.mean) -> keras.Model:
    """N4: penalties on weights, on activities, and a term of a layer's own."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(7, kernel_regularizer="l2", activity_regularizer="l2"),
            AddsLoss(reduce),
            keras.layers.Dense(3, kernel_regularizer="l1", bias_regularizer="l2"),
        ]
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_regularisers_and_add_loss(loss_on: str) -> None:
    """N4: https://github.com/keras-team/keras/issues/7178."""
    x, y = rows(10, 6), rows(10, 3, seed=1)
    bare, parallel = pair(regularised, 4, loss_on=loss_on, loss="mse", **SGD)
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2, validation_data=(x, y))
    bare, parallel = pair(
        lambda: regularised(keras.ops.sum), 4, loss_on=loss_on, rules={"add_loss": "sum"},
        loss="mse", **SGD,
    )  # fmt: skip
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2, validation_data=(x, y))


def test_what_an_activity_regulariser_is() -> None:
    """A mean over rows since Keras 3.15, a sum before; the rule follows."""
    layer = keras.layers.Dense(2, activity_regularizer="l2")
    layer(np.ones((1, 3)))
    one = float(layer.losses[0])
    layer(np.ones((2, 3)))
    assert float(layer.losses[0]) == pytest.approx(one if ACTIVITY_RULE == "mean" else 2 * one)


class Vae(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.layers.Dense(4)
        self.decoder = keras.layers.Dense(6)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        code = self.encoder(x)
        self.add_loss(0.1 * keras.ops.mean(keras.ops.sum(code**2, axis=-1)))
        return self.decoder(code)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("towers", [2, 3])
@pytest.mark.parametrize("loss", ["mse", None])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # the decoder, where loss=None
def test_model_with_a_loss_of_its_own(towers: int, loss: str | None) -> None:
    """N7: https://github.com/keras-team/keras/issues/9178."""
    x = rows(10, 6)
    bare, parallel = pair(Vae, towers, loss=loss, **SGD)
    assert_same_fit(bare, parallel, x, x if loss else None, batch_size=7, epochs=2)


class OwnLoss(pk.DataParallelModel):
    def compute_loss(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(x, y, y_pred, *args, **kwargs) + 0.1 * keras.ops.mean(y_pred**2)


class OwnLossBare(keras.Sequential):
    def compute_loss(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(x, y, y_pred, *args, **kwargs) + 0.1 * keras.ops.mean(y_pred**2)


def test_overridden_compute_loss() -> None:
    x, y = rows(10, 6), rows(10, 3, seed=1)
    bare = OwnLossBare([keras.Input((6,)), keras.layers.Dense(3)])
    parallel = OwnLoss(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]), 4)
    parallel.template.set_weights(bare.get_weights())
    for model in (bare, parallel):
        model.compile(keras.optimizers.SGD(0.05), "mse")
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)


class OwnCall(pk.DataParallelModel):
    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().call(inputs, *args, **kwargs)


def test_overridden_call() -> None:
    """What a subclass does to the merged outputs is part of the loss."""

    def doubled() -> keras.Model:
        model = mlp()
        return keras.Sequential([keras.Input((6,)), *model.layers, keras.layers.Rescaling(2.0)])

    x, y = rows(10, 6), rows(10, 3, seed=1)
    keras.utils.set_random_seed(7)
    bare = doubled()
    parallel = OwnCall(mlp(), 4)
    parallel.template.set_weights(bare.get_weights())
    for model in (bare, parallel):
        model.compile(keras.optimizers.SGD(0.05), "mse")
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)


@pytest.mark.parametrize("name", ["call", "fn", "__call__"])
def test_losses_of_keras_that_were_changed_are_not_known(name: str) -> None:
    """X13: code of the user's own may look at all rows."""
    loss = keras.losses.MeanSquaredError()
    setattr(loss, name, lambda y_true, y_pred: keras.ops.max(keras.ops.abs(y_true - y_pred)))
    assert not losses.decide(loss).proven


def test_metrics_of_keras_that_were_changed_are_not_known() -> None:
    """X13: see above."""
    metric = keras.metrics.MeanSquaredError()
    assert losses.is_additive(metric)
    vars(metric)["update_state"] = lambda y_true, y_pred, sample_weight=None: None
    assert not losses.is_additive(metric)
