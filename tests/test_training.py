"""Losses, optimizers, precision, data of every kind: as on one device."""

import gc
import inspect
import weakref
from collections import namedtuple
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.towers.losses import ACTIVITY_RULE
from tests.parity import (
    ATOL,
    RTOL,
    assert_same_fit,
    assert_same_variables,
    batches,
    mlp,
    pair,
    rng,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


# --- losses -------------------------------------------------------------------------------------


def in_batch_softmax(y_true: Any, y_pred: Any) -> Any:
    """N9: every other row of the batch is a negative."""
    logits = keras.ops.matmul(y_true, keras.ops.transpose(y_pred))
    labels = keras.ops.arange(keras.ops.shape(logits)[0])
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def row_wise(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(keras.ops.abs(y_true - y_pred) ** 1.5, axis=-1)


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


@pytest.mark.parametrize("loss_on", ["auto", "merged"])
def test_class_weight(loss_on: str) -> None:
    """N12: https://github.com/tensorflow/tensorflow/issues/41290."""
    x, y = rows(10, 6), rng(1).integers(0, 3, 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    bare, parallel = pair(mlp, 4, loss_on=loss_on, loss=loss, weighted_metrics=["accuracy"], **SGD)
    assert_same_fit(
        bare, parallel, x, y, batch_size=7, epochs=2, class_weight={0: 0.1, 1: 2.0, 2: 1.0}
    )


def masked() -> keras.Model:
    tokens = keras.Input((7,), dtype="int32")
    hidden = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    hidden = keras.layers.LSTM(6, return_sequences=True)(hidden)
    return keras.Model(tokens, keras.layers.Dense(4)(hidden))


@pytest.mark.parametrize("weighted", [False, True])
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


# --- metrics ------------------------------------------------------------------------------------


class BatchSpread(keras.metrics.Metric):
    """A metric that sees the batch: the mean over steps of the standard deviation."""

    def __init__(self) -> None:
        super().__init__(name="spread")
        self.spread = self.add_weight(name="spread", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.spread.assign_add(keras.ops.std(y_pred))

    def result(self) -> Any:
        return self.spread


def binary() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, activation="sigmoid")])


@pytest.mark.parametrize("seen_by_batch", [False, True])
def test_metrics(seen_by_batch: bool) -> None:
    """N2, N6: https://github.com/tensorflow/tensorflow/issues/48152."""

    def metrics() -> list[Any]:
        known = [
            keras.metrics.AUC(name="auc"),
            keras.metrics.F1Score(threshold=0.5, name="f1"),
            keras.metrics.FalseNegatives(name="fn"),
            keras.metrics.TruePositives(name="tp"),
            keras.metrics.Precision(name="p"),
            keras.metrics.PrecisionAtRecall(0.5, name="par"),
            keras.metrics.OneHotMeanIoU(num_classes=2, name="iou"),
            "accuracy",
            "mae",
        ]
        others = [
            BatchSpread(),
            keras.metrics.R2Score(name="r2"),
            keras.metrics.CosineSimilarity(name="cos"),
            row_wise,
        ]
        return known + (others if seen_by_batch else [])

    x, y = rows(10, 6), keras.utils.to_categorical(rng(1).integers(0, 2, 10), 2)
    for loss_on in ("auto", "merged"):
        bare, parallel = pair(
            binary, 4, loss_on=loss_on, loss="binary_crossentropy", **SGD,
            metrics=_maker(metrics), weighted_metrics=_maker(lambda: [keras.metrics.AUC(name="w")]),
        )  # fmt: skip
        assert_same_fit(
            bare, parallel, x, y, batch_size=7, epochs=2, validation_data=(x, y),
            sample_weight=rng(3).random(10).astype("float32"),
        )  # fmt: skip


def _maker(make: Any) -> Any:
    return lambda: make()


# --- optimizers ---------------------------------------------------------------------------------


def _optimizer(name: str) -> Any:
    return lambda: getattr(keras.optimizers, name)(0.01)


# All that this version of Keras has, without those that wrap others.
WRAPPERS = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
OPTIMIZERS = {
    **{
        name: _optimizer(name)
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in WRAPPERS
    },
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
    "accumulate": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    ),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "fixed loss scale": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """C10: https://github.com/tensorflow/tensorflow/issues/32960."""
    x, y = rows(33, 6), rows(33, 3, seed=1)
    loss_on = "towers" if len(name) % 2 else "merged"
    bare, parallel = pair(mlp, 4, loss_on=loss_on, loss="mse", optimizer=OPTIMIZERS[name])
    assert_same_fit(bare, parallel, x, y, batch_size=8, epochs=4)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy: str, loss_on: str) -> None:
    """Half precision rounds sums of other groups of rows otherwise: 3 digits are all there are."""
    x, y = rows(33, 6), rows(33, 3, seed=1)

    def build() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(7, activation="tanh", dtype=policy),
                keras.layers.Dense(3, dtype=policy),
            ]
        )

    def half() -> keras.Model:
        model = build()
        model.dtype_policy = keras.dtype_policies.get(policy)
        return model

    bare, parallel = pair(half, 4, loss_on=loss_on, loss="mse", **SGD)
    assert isinstance(parallel.optimizer, type(bare.optimizer))
    assert isinstance(bare.optimizer, keras.optimizers.LossScaleOptimizer) == (
        policy == "mixed_float16"
    )
    for model in (bare, parallel):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    tolerance = 2e-3 if policy == "mixed_float16" else 2e-2
    for one, other in zip(bare.weights, parallel.weights, strict=True):
        assert one.dtype == other.dtype == "float32"
        np.testing.assert_allclose(other.numpy(), one.numpy(), atol=tolerance)
    assert parallel(x).dtype == bare(x).dtype


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_overflow_on_one_tower_skips_the_step(loss_on: str) -> None:
    x, y = rows(8, 6), rows(8, 3, seed=1)
    x_bad = x.copy()
    x_bad[5] = np.inf
    bare, parallel = pair(
        mlp, 4, loss_on=loss_on, loss="mse",
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    )  # fmt: skip
    for model in (bare, parallel):
        model.train_on_batch(x, y)
    before = parallel.get_weights()
    for model in (bare, parallel):
        model.train_on_batch(x_bad, y)
    for old, new in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(parallel.optimizer.dynamic_scale.value) == float(
        bare.optimizer.dynamic_scale.value
    )
    for model in (bare, parallel):
        model.train_on_batch(x, y)
    assert_same_variables(bare, parallel)


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_frozen_layers_stay_bit_equal(loss_on: str) -> None:
    """C4: https://github.com/keras-team/keras/issues/9198."""
    x, y = rows(10, 6), rows(10, 3, seed=1)

    def build() -> keras.Model:
        model = mlp()
        model.layers[0].trainable = False
        return model

    bare, parallel = pair(build, 4, loss_on=loss_on, loss="mse", **SGD)
    frozen = [weight.numpy() for weight in parallel.template.layers[0].weights]
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    for old, weight in zip(frozen, parallel.template.layers[0].weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    for model in (bare, parallel):
        model.layers[0].trainable = True
        model.layers[1].trainable = False
        model.compile(keras.optimizers.SGD(0.05), "mse")
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    assert not np.array_equal(parallel.template.layers[0].weights[0].numpy(), frozen[0])


def test_embedding_gradients_stay_sparse() -> None:
    """P4: https://github.com/tensorflow/tensorflow/issues/53160."""
    x, y = rng().integers(0, 50, (10, 4)), rows(10, 4, 3, seed=1)

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((4,)), keras.layers.Embedding(50, 3)])

    for loss_on in ("merged", "towers"):
        seen: list[Any] = []

        class Watching(keras.optimizers.SGD):
            def apply_gradients(self, pairs: Any) -> Any:
                pairs = list(pairs)
                seen.extend(type(gradient) for gradient, _ in pairs)  # noqa: B023
                return super().apply_gradients(pairs)

        bare, parallel = pair(
            build, 3, loss_on=loss_on, loss="mse", optimizer=lambda: Watching(0.1)
        )
        assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
        assert set(seen) == {tf.IndexedSlices}


# --- data ---------------------------------------------------------------------------------------

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


# --- templates ----------------------------------------------------------------------------------


class Unbuilt(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(20, 5)
        self.dense = keras.layers.Dense(3)

    def call(self, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.dense(keras.ops.mean(self.embed(tokens), axis=1))


def test_unbuilt_template() -> None:
    """C3: built from the first batch, as the bare model is."""
    x, y = rng().integers(0, 20, (10, 4)), rows(10, 3, seed=1)
    bare, parallel = pair(Unbuilt, 4, loss="mse", **SGD)
    assert not parallel.built
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)
    assert parallel.built
    bare, parallel = pair(lambda: keras.Sequential([keras.layers.Dense(3)]), 4, loss="mse", **SGD)
    assert_same_fit(bare, parallel, rows(10, 6), y, batch_size=7, epochs=2)


class TwoArguments(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, a: tf.Tensor, b: tf.Tensor, *, factor: float = 1.0) -> tf.Tensor:
        return self.dense(a) + factor * self.dense(b)


def test_extra_arguments_reach_every_tower() -> None:
    model = TwoArguments()
    a, b = tf.constant(rows(7, 6)), tf.constant(rows(7, 6, seed=1))
    expected = model(a, b, factor=2.0)
    parallel = pk.DataParallelModel(model, 3)
    np.testing.assert_allclose(parallel(a, b, factor=2.0), expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(parallel(a, b=b, factor=2.0), expected, rtol=RTOL, atol=ATOL)


def test_variables_are_the_templates() -> None:
    """S4: https://github.com/keras-team/keras/issues/11313."""
    bare, parallel = pair(mlp, 4, loss="mse", **SGD)
    del bare
    assert parallel.variables
    for own, theirs in zip(parallel.variables, parallel.template.variables, strict=True):
        assert own is theirs


def test_inherits_compile() -> None:
    template = mlp()
    optimizer, metric = keras.optimizers.Adam(), keras.metrics.MeanAbsoluteError()
    template.compile(optimizer, "mse", metrics=[metric])
    parallel = pk.DataParallelModel(template, 2)
    assert parallel.optimizer is optimizer
    x, y = rows(10, 6), rows(10, 3, seed=1)
    history = parallel.fit(x, y, verbose=0).history
    assert set(history) == {"loss", "mean_absolute_error"}
    assert float(metric.result()) == pytest.approx(history["mean_absolute_error"][0])


class ReadsBatchSize(keras.layers.Layer):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, (tf.shape(x)[0], 3, 2))[:, :, 0]


def test_layer_that_reads_the_batch_size() -> None:
    """It sees the size of its shard."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((6,)), ReadsBatchSize(), keras.layers.Dense(3)])

    x, y = rows(17, 6), rows(17, 3, seed=1)
    bare, parallel = pair(build, 4, loss="mse", **SGD)
    assert_same_fit(bare, parallel, batches([7, 2, 8], x, y), epochs=1)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["merged", "towers", "own tape", "one tower"])
def test_crossentropies_do_not_saturate(activation: str, how: str) -> None:
    """Keras computes them from the logits that it attaches to outputs, which towers lose."""

    def build() -> keras.Model:
        initializer = keras.initializers.RandomNormal(stddev=60.0, seed=3)
        dense = keras.layers.Dense(3, activation=activation, kernel_initializer=initializer)
        return keras.Sequential([keras.Input((6,)), dense])

    loss = "categorical_crossentropy" if activation == "softmax" else "binary_crossentropy"
    towers, loss_on = (
        (1, "auto") if how == "one tower" else (3, how if how != "own tape" else "auto")
    )
    bare, parallel = pair(build, towers, loss_on=loss_on, optimizer="sgd", loss=loss)
    x, y = rows(10, 6), np.eye(3, dtype="float32")[np.arange(10) % 3]
    if how != "own tape":
        assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=1)
        return
    gradients = []
    for model in (bare, parallel):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(getattr(keras.losses, loss)(y, model(x)))
        gradients.append([value, *tape.gradient(value, model.trainable_weights)])
    assert float(gradients[0][0]) > 20  # beyond what probabilities in float32 can tell
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("towers", [1, 3])
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_the_graph_of_a_step_goes_with_its_model(loss_on: str, towers: int) -> None:
    """M5: https://github.com/tensorflow/tensorflow/issues/42616."""
    template = mlp()
    graphs: list[weakref.ref[Any]] = []

    class Noticing(pk.DataParallelModel):
        def train_step(self, data: Any) -> Any:
            graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
            return super().train_step(data)

    for _ in range(3):
        parallel = Noticing(template, towers, loss_on="merged" if towers == 1 else loss_on)
        parallel.compile("adam", "mse", metrics=["mae"])
        parallel.fit(rows(12, 6), rows(12, 3), batch_size=4, verbose=0)
    del parallel
    template.compile("sgd", "mse")  # the template holds on to the last optimizer
    gc.collect()
    assert len(graphs) >= 3
    assert [graph for graph in graphs if graph() is not None] == []
