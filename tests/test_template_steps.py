"""C8: steps of the template's own, in the shapes of Keras' tutorials, equal to one device.

https://github.com/keras-team/keras/issues/14104
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_variables, rows


def dense(units: int, inputs: int, name: str, activation: str | None = None) -> keras.Model:
    first = keras.Input((inputs,))
    hidden = keras.layers.Dense(5, activation="tanh")(first)
    return keras.Model(first, keras.layers.Dense(units, activation=activation)(hidden), name=name)


class Autoencoder(keras.Model):
    """Trackers of its own behind a `metrics` property, and no `call`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = dense(4, 6, "encoder"), dense(6, 2, "decoder")
        self.total = keras.metrics.Mean(name="total")
        self.divergence = keras.metrics.Mean(name="divergence")

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [self.total, self.divergence]

    def losses_of(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        mean, log_variance = tf.split(self.encoder(x), 2, axis=1)
        # Fixed noise: random layers draw another stream on each tower.
        noise = tf.sin(100 * x[:, :2])
        decoded = self.decoder(mean + tf.exp(log_variance / 2) * noise)
        divergence = -0.5 * (1 + log_variance - mean**2 - tf.exp(log_variance))
        divergence = tf.reduce_mean(tf.reduce_sum(divergence, axis=1))
        return tf.reduce_mean((x - decoded) ** 2) + divergence, divergence

    def counted(self, total: tf.Tensor, divergence: tf.Tensor) -> dict[str, tf.Tensor]:
        self.total.update_state(total)
        self.divergence.update_state(divergence)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x = keras.utils.unpack_x_y_sample_weight(data)[0]
        with tf.GradientTape() as tape:
            total, divergence = self.losses_of(x)
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return self.counted(total, divergence)

    def test_step(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.counted(*self.losses_of(x))


class Adversarial(keras.Model):
    """Two optimizers, a `compile` of its own, the discriminator called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = dense(6, 3, "generator")
        self.discriminator = dense(1, 6, "discriminator")
        self.tracker = keras.metrics.Mean(name="d_loss")

    def compile(self, d_optimizer: Any, g_optimizer: Any, loss_fn: Any) -> None:
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def train_step(self, real: tf.Tensor) -> dict[str, tf.Tensor]:
        latent = tf.cos(50 * real[:, :3])
        fake = self.generator(latent)
        both = tf.concat([fake, real], axis=0)
        labels = tf.concat([tf.ones_like(fake[:, :1]), tf.zeros_like(real[:, :1])], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(both))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            guess = self.discriminator(self.generator(latent))
            g_loss = self.loss_fn(tf.zeros_like(latent[:, :1]), guess)
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.tracker.update_state(d_loss)
        return {"d_loss": self.tracker.result(), "g_loss": g_loss}


class Distiller(keras.Model):
    """A frozen teacher beside a student; only `compute_loss` and `call` are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = dense(3, 6, "teacher"), dense(3, 6, "student")
        self.teacher.trainable = False

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.student(x)

    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        own = super().compute_loss(x, y, y_pred, sample_weight, training)
        soft = tf.nn.softmax(self.teacher(x, training=False) / 2)
        return own + keras.losses.KLDivergence()(soft, tf.nn.softmax(y_pred / 2))


class Contrastive(keras.Model):
    """Two views of each row; every other row of the batch is a negative."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = dense(4, 6, "encoder"), dense(3, 4, "head")
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")

    def train_step(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            views = [self.head(self.encoder(view)) for view in (x + 0.1, x * 1.1)]
            one, other = (tf.math.l2_normalize(view, axis=1) for view in views)
            logits = tf.matmul(one, other, transpose_b=True) / self.temperature
            loss = tf.reduce_mean(
                keras.losses.sparse_categorical_crossentropy(
                    tf.range(tf.shape(x)[0]), logits, from_logits=True
                )
            )
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss}


class CountsAccuracy(keras.Model):
    """Only `compute_metrics` is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense(3, 6, "inner")
        self.spread = keras.metrics.Mean(name="spread")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.inner(x)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.spread.update_state(tf.math.reduce_std(y_pred))
        return {**results, "spread": self.spread.result()}


def supervised(model: keras.Model) -> None:
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])


def alone(model: keras.Model) -> None:
    model.compile(keras.optimizers.Adam(0.01))


def adversaries(model: keras.Model) -> None:
    model.compile(
        d_optimizer=keras.optimizers.SGD(0.1),
        g_optimizer=keras.optimizers.Adam(0.01),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
    )


X, Y = rows(23, 6), rows(23, 3, seed=1)
CASES: dict[str, tuple[type[keras.Model], Callable[[keras.Model], None], tuple[Any, ...]]] = {
    "autoencoder": (Autoencoder, alone, (X,)),
    "adversarial": (Adversarial, adversaries, (X,)),
    "distillation": (Distiller, supervised, (X, Y)),
    "contrastive": (Contrastive, alone, (X,)),
    "metrics": (CountsAccuracy, supervised, (X, Y)),
}


def both(case: str, towers: int) -> tuple[keras.Model, pk.DataParallelModel, tuple[Any, ...]]:
    kind, compile_, data = CASES[case]
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        models.append(kind())
    compile_(models[0])
    parallel = pk.DataParallelModel(models[1], towers)
    compile_(parallel)
    return models[0], parallel, data


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("case", "towers"), [*((case, 4) for case in CASES), ("adversarial", 1), ("adversarial", 2)]
)
def test_tutorials(case: str, towers: int) -> None:
    """23 rows, 5 at a time: the last batch has fewer rows than 4 towers."""
    bare, parallel, data = both(case, towers)
    histories = [
        model.fit(*data, batch_size=5, epochs=2, shuffle=False, verbose=0).history
        for model in (bare, parallel)
    ]
    assert list(histories[0]) == list(histories[1])
    for key, values in histories[0].items():
        np.testing.assert_allclose(histories[1][key], values, rtol=RTOL, atol=ATOL, err_msg=key)
    assert_same_variables(bare, parallel)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", ["autoencoder", "distillation", "metrics"])
def test_evaluate(case: str) -> None:
    bare, parallel, data = both(case, 4)
    expected = bare.evaluate(*data, batch_size=5, verbose=0, return_dict=True)
    actual = parallel.evaluate(*data, batch_size=5, verbose=0, return_dict=True)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=RTOL, atol=ATOL, err_msg=key)


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"steps_per_execution": 3}])
def test_ways_to_run(how: dict[str, Any]) -> None:
    bare, parallel, data = both("distillation", 3)
    for model in (bare, parallel):
        model.compile(keras.optimizers.Adam(0.01), "mse", **how)
        model.fit(*data, batch_size=5, epochs=2, shuffle=False, verbose=0)
    assert_same_variables(bare, parallel)


def test_one_batch_at_a_time() -> None:
    bare, parallel, data = both("autoencoder", 4)
    for model in (bare, parallel):
        results = [model.train_on_batch(data[0][:size]) for size in (7, 3, 1)]
        assert len({str(result) for result in results}) == 3
    assert_same_variables(bare, parallel)


class Doubles(keras.Sequential):
    def predict_step(self, data: Any) -> tf.Tensor:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return 2 * self(x, training=False)


def test_predict() -> None:
    template = Doubles([keras.Input((6,)), keras.layers.Dense(3)])
    parallel = pk.DataParallelModel(template, 4)
    expected = 2 * template(X)
    np.testing.assert_allclose(
        parallel.predict(X, batch_size=5, verbose=0), expected, rtol=RTOL, atol=ATOL
    )
    # Only its `predict` is its own: `fit` may still take the loss to the towers.
    parallel.compile("sgd", "mse")
    assert parallel.loss_path.reduction == "mean"


LARGE = 100.0


class OnWhichRows(keras.layers.Layer):
    """Tells how many rows each call saw, of large numbers: others are what a model is tried on."""

    seen: list[int]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def note(rows: Any) -> Any:
            if np.abs(rows).max() > LARGE:
                self.seen.append(len(rows))
            return len(rows)

        counted = tf.py_function(note, [x], tf.int32)
        with tf.control_dependencies([counted]):
            return tf.identity(x)


def test_forward_passes_are_cut_among_the_towers() -> None:
    """What stands in `train_step` itself sees the whole batch."""
    whole: list[int] = []

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.counting = OnWhichRows()
            self.inner = keras.Sequential([keras.Input((6,)), self.counting])
            self.last = dense(1, 6, "last")

        def train_step(self, data: Any) -> dict[str, tf.Tensor]:
            x = keras.utils.unpack_x_y_sample_weight(data)[0]
            whole.append(x.shape[0])
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.last(self.inner(x)) ** 2)
            weights = self.last.trainable_weights
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    template = Own()
    template.counting.seen = []
    parallel = pk.DataParallelModel(template, 4)
    parallel.compile("sgd")
    parallel.train_on_batch(X[:10] + 2 * LARGE)
    assert whole == [10]
    assert sorted(template.counting.seen) == [2, 2, 3, 3]
    # The template is as it was: called by itself, nothing is cut.
    template.counting.seen.clear()
    template.inner(X[:10] + 2 * LARGE)
    assert template.counting.seen == [10]


class AddsLoss(keras.layers.Layer):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        self.add_loss(tf.reduce_mean(x**2))
        return x


class WeighsLosses(keras.Model):
    """`self.losses` in a step of its own, beside weight and activity regularisers."""

    def __init__(self) -> None:
        super().__init__()
        inputs = keras.Input((6,))
        regularizers = {
            "kernel_regularizer": keras.regularizers.L2(0.1),
            "activity_regularizer": keras.regularizers.L2(0.1),
        }
        hidden = AddsLoss()(keras.layers.Dense(5, **regularizers)(inputs))
        self.inner = keras.Model(inputs, keras.layers.Dense(3)(hidden))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.inner(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> tf.Tensor:
        return super().compute_loss(*args, **kwargs) + 3 * tf.add_n(self.losses)


def test_added_losses_are_there() -> None:
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        models.append(WeighsLosses())
    models[1] = pk.DataParallelModel(models[1], 4)
    for model in models:
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(X, Y, batch_size=5, epochs=2, shuffle=False, verbose=0)
    assert_same_variables(*models)


def test_steps_in_template_and_subclass_are_refused() -> None:
    class Own(pk.DataParallelModel):
        def train_step(self, data: Any) -> Any:
            return super().train_step(data)

    with pytest.raises(ValueError, match=r"not in both.*own=\['train_step'\].*\['compute_loss'\]"):
        Own(Distiller(), 2)
    # Either of them alone is fine.
    Own(dense(3, 6, "plain"), 2)
    pk.DataParallelModel(Distiller(), 2)


def test_loss_on_towers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `loss_on` to be .*templates=\['compute_loss'\]"
    ):
        pk.DataParallelModel(Distiller(), 2, loss_on="towers")
