"""Terms that layers add to the loss are those of one device."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import assert_same_fit, batches, pair, rows

OPS = keras.ops


class Adds(keras.layers.Layer):
    """Adds this function of its inputs to the loss."""

    def __init__(self, term: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(**options)
        self.term = term

    def call(self, x: Any) -> Any:
        self.add_loss(self.term(x))
        return x


def chain(*layers: Callable[[], keras.layers.Layer]) -> keras.Model:
    x = inputs = keras.Input((6,))
    for layer in layers:
        x = layer()(x)
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def adds(term: Callable[[Any], Any]) -> Callable[[], keras.Model]:
    return lambda: chain(lambda: keras.layers.Dense(3, activation="tanh"), lambda: Adds(term))


TERMS: dict[str, Callable[[Any], Any]] = {
    "one column": lambda x: 0.1 * OPS.sum(x**2, axis=-1, keepdims=True),
    "a value for each row": lambda x: 0.1 * OPS.sum(OPS.abs(x), axis=-1),
    "the whole output": lambda x: 0.1 * x**2,
    "means of columns": lambda x: 0.1 * OPS.mean(x**2, axis=0),
    "mean": lambda x: 0.1 * OPS.mean(x**2),
    "sum": lambda x: 0.1 * OPS.sum(x**2),
    "mean of sums": lambda x: 0.1 * OPS.mean(OPS.sum(OPS.exp(x), axis=-1)),
    "rows twice": lambda x: 0.1 * OPS.reshape(OPS.concatenate([x, x**2], axis=1), (-1, 3)),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, loss_on: str) -> None:
    """X9: Keras adds up what has rows, so a term with a value for each row is a sum."""
    bare, parallel = pair(
        adds(TERMS[name]),
        3,
        loss_on=loss_on,
        loss="mse",
        optimizer=lambda: keras.optimizers.SGD(0.1),
    )
    x, y = rows(22, 6), rows(22, 2, seed=1)
    assert_same_fit(bare, parallel, batches((7, 6, 1, 2, 6), x, y), epochs=2)
    for size in (6, 3, 7):
        scores = [m.train_on_batch(x[:size], y[:size]) for m in (bare, parallel)]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["one column", "mean"])
def test_terms_eagerly(name: str) -> None:
    """X9: without a graph."""
    bare, parallel = pair(
        adds(TERMS[name]),
        3,
        loss="mse",
        optimizer=lambda: keras.optimizers.SGD(0.1),
        run_eagerly=True,
    )
    assert_same_fit(bare, parallel, rows(13, 6), rows(13, 2), batch_size=6)


class Encoder(keras.Model):
    """Adds terms itself and by a layer that it calls twice, which are means and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(6, activation="tanh")
        self.adds, self.out = Adds(lambda x: 0.1 * OPS.sum(x**2)), keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        h = self.adds(self.dense(self.adds(x)))
        self.add_loss(0.1 * OPS.mean(OPS.sum(h**2, axis=-1)))
        self.add_loss(0.1 * OPS.sum(OPS.abs(h)))
        self.add_loss(0.1 * OPS.sum(self.dense.kernel**2))
        return self.out(h)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_sums_and_means_in_one_model(loss_on: str) -> None:
    """X9: what nobody declared is found out by trying the layer that adds it."""

    def build() -> keras.Model:
        model = Encoder()
        model(rows(1, 6))
        return model

    bare, parallel = pair(
        build, 3, loss_on=loss_on, loss="mse", optimizer=lambda: keras.optimizers.SGD(0.01)
    )
    x, y = rows(22, 6), rows(22, 2, seed=1)
    assert_same_fit(bare, parallel, batches((7, 6, 1, 2, 6), x, y), epochs=2)


@pytest.mark.parametrize(
    "term",
    [
        lambda x: OPS.sum(OPS.var(x, axis=0)),
        lambda x: OPS.maximum(OPS.mean(x**2), 0.25),  # a mean of rows with large numbers
    ],
)
def test_terms_that_look_at_several_rows_are_named(
    term: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """X9: a scalar that is neither a sum nor a mean."""
    _, parallel = pair(adds(term), 3, loss="mse", optimizer="sgd")
    parallel.fit(rows(6, 6), rows(6, 2), verbose=0)
    assert [r for r in caplog.records if "no mean or sum over rows" in r.message]


class Noisy(keras.layers.Layer):
    """Adds a term of noisy inputs to the loss, as a variational autoencoder does."""

    def __init__(self, reduce: Callable[[Any], Any]) -> None:
        super().__init__()
        self.reduce = reduce
        self.norm = keras.layers.BatchNormalization(momentum=0.5)
        self.drop = keras.layers.Dropout(0.2)

    def call(self, x: Any, training: bool = False) -> Any:
        self.add_loss(self.reduce(self.drop(self.norm(x, training=training) + 3.0) ** 2))
        return x


@pytest.mark.parametrize(("reduce", "source"), [(OPS.sum, "found_sum"), (OPS.mean, "add_loss")])
def test_random_terms(reduce: Any, source: str, caplog: pytest.LogCaptureFixture) -> None:
    """X9: where a layer draws or normalises, it is tried without."""
    template = keras.Sequential([keras.Input((6,)), Noisy(reduce), keras.layers.Dense(2)])
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("sgd", "mse")
    x, y = rows(7, 6), rows(7, 2)
    parallel.train_on_batch(x, y)
    # Normalised rows plus 3, squared: 10 in the mean.
    losses = parallel.evaluate(x, y, verbose=0)
    count = x.size if source == "found_sum" else 1
    assert 0.5 * 10 * count < losses < 2 * 10 * count
    assert not [r for r in caplog.records if "could not be found out" in r.message]


@pytest.mark.parametrize(("reduce", "said"), [(OPS.sum, 0), (OPS.mean, 2)])
def test_terms_that_are_always_random(
    reduce: Any, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    """X9: a sum is told from others, and each layer of which nothing is known is named."""

    class Draws(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.1 * reduce((x + keras.random.normal(OPS.shape(x))) ** 2))
            return x

    template = keras.Sequential([keras.Input((6,)), Draws(), Draws()])
    parallel = pk.DataParallelModel(template, 3)
    parallel.compile("sgd", "mse")
    x = rows(7, 6)
    loss = parallel.evaluate(x, x, verbose=0)
    expected = 2 * 0.1 * 2 * (1 if said else x.size)
    assert 0.5 * expected < loss < 2 * expected
    found = [r.message for r in caplog.records if "could not be found out" in r.message]
    assert len(found) == len(set(found)) == said


def test_terms_about_pairs_of_rows() -> None:
    """X9: no tower can compute its part of them."""
    _, parallel = pair(
        adds(lambda x: OPS.matmul(x, OPS.transpose(x))), 3, loss="mse", optimizer="sgd"
    )
    with pytest.raises(ValueError, match=r"(?s)output add_loss.*pairs of rows"):
        parallel.fit(rows(6, 6), rows(6, 2), verbose=0)


class Sparsity(keras.regularizers.Regularizer):
    """The penalty of a sparse autoencoder: how often units are active, over all rows."""

    def __call__(self, x: Any) -> Any:
        rate = OPS.clip(OPS.mean(x, axis=0), 1e-3, 0.999)
        return 0.3 * OPS.sum(0.1 * OPS.log(0.1 / rate) + 0.9 * OPS.log(0.9 / (1 - rate)))


REGULARIZERS: dict[str, Callable[[], Any]] = {
    "l2": lambda: "l2",
    "l1_l2": lambda: keras.regularizers.L1L2(0.1, 0.2),
    "a mean": lambda: lambda x: 0.3 * OPS.mean(x**2),
    "a sum": lambda: lambda x: 0.3 * OPS.sum(x**4),
    "sparsity": Sparsity,
    "largest": lambda: lambda x: 0.3 * OPS.max(x),
    "orthogonal": lambda: keras.regularizers.OrthogonalRegularizer(0.3, mode="columns"),
    "variance": lambda: lambda x: 0.3 * OPS.sum(OPS.var(x, axis=0)),
}


def regularised(make: Callable[[], Any]) -> Callable[[], keras.Model]:
    return lambda: chain(
        lambda: keras.layers.Dense(4, activation="sigmoid", activity_regularizer=make())
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_activity_regularisers(name: str) -> None:
    """X9: of the whole batch, also those that look at several rows."""
    bare, parallel = pair(
        regularised(REGULARIZERS[name]), 3, loss="mse", optimizer=lambda: keras.optimizers.SGD(0.1)
    )
    x, y = rows(22, 6), rows(22, 2, seed=1)
    assert_same_fit(bare, parallel, batches((7, 6, 1, 2, 6), x, y), epochs=2)
    for size in (6, 3, 7):
        scores = [m.train_on_batch(x[:size], y[:size]) for m in (bare, parallel)]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("mode", ["run_eagerly", "jit_compile"])
def test_activity_regularisers_otherwise(mode: str) -> None:
    """X9: without a graph, and by XLA."""
    bare, parallel = pair(regularised(Sparsity), 3, loss="mse", optimizer="adam", **{mode: True})
    assert_same_fit(bare, parallel, rows(13, 6), rows(13, 2), batch_size=6)


def test_activity_regularisers_need_the_whole_batch() -> None:
    """X9: who insists on the towers is told why not."""
    _, parallel = pair(regularised(Sparsity), 3, loss_on="towers", loss="mse", optimizer="adam")
    with pytest.raises(ValueError, match=r"activity regulariser may look at several rows"):
        parallel.fit(rows(6, 6), rows(6, 2), verbose=0)


class Reads(keras.Model):
    """Its step takes the terms of one inner layer, and not those of others."""

    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner
        self.noise = Adds(lambda x: OPS.sum(x**2))

    def call(self, x: Any) -> Any:
        return self.noise(self.inner(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            terms = self.inner.layers[2].losses
            loss += tf.add_n([tf.reduce_sum(term) for term in terms])
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "terms": OPS.cast(len(self.losses), "float32")}


@pytest.mark.parametrize("inner", [adds(TERMS["mean"]), adds(TERMS["one column"])])
def test_losses_of_inner_layers(inner: Callable[[], keras.Model]) -> None:
    """X12: `layer.losses` are on the layer that they came from."""

    def build() -> keras.Model:
        model = Reads(inner())
        model(rows(1, 6))
        return model

    bare, parallel = pair(build, 3, optimizer=lambda: keras.optimizers.SGD(0.1))
    assert_same_fit(bare, parallel, rows(13, 6), rows(13, 2), batch_size=7)


class OwnLoss(keras.Model):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [OwnLoss, OwnStep])
@pytest.mark.parametrize("name", ["mean", "one column", "l2", "sparsity"])
def test_functional_templates_with_steps_of_their_own(name: str, kind: type) -> None:
    """X18: terms go to the layers that they came from; a functional model takes none itself."""
    build = adds(TERMS[name]) if name in TERMS else regularised(REGULARIZERS[name])

    def own() -> keras.Model:
        model = build()
        return kind(model.inputs, model.outputs[0])

    bare, parallel = pair(own, 3, loss="mse", optimizer=lambda: keras.optimizers.SGD(0.1))
    assert_same_fit(bare, parallel, rows(13, 6), rows(13, 2), batch_size=7)


def test_terms_of_layers_that_keras_does_not_know_do_not_count() -> None:
    """X12: a layer that hides in a function has no say in `model.losses`."""

    def build() -> keras.Model:
        hidden = Adds(TERMS["mean"])
        return chain(lambda: keras.layers.Lambda(lambda x: hidden(x)))

    bare, parallel = pair(build, 3, loss="mse", optimizer="sgd")
    assert_same_fit(bare, parallel, rows(13, 6), rows(13, 2), batch_size=7)
    assert pk.DataParallelModel is type(parallel)


class Traced(Adds):
    """A call that is traced by itself, which Keras does not expect."""

    call = tf.function(Adds.call)


class TracedDense(keras.layers.Dense):
    call = tf.function(keras.layers.Dense.call)


class AroundIt(keras.layers.Layer):
    def __init__(self, inner: keras.layers.Layer) -> None:
        super().__init__()
        self.inner = inner

    @tf.function
    def call(self, x: Any) -> Any:
        return self.inner(x)


@pytest.mark.parametrize("nested", [False, True])
def test_terms_that_one_device_loses_are_named(
    nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """They count on several towers, as they would without the `tf.function`."""

    def term(x: Any) -> Any:
        return OPS.mean(x**2)

    def traced() -> keras.layers.Layer:
        return AroundIt(Adds(term)) if nested else Traced(term)

    def build() -> keras.Model:
        return chain(lambda: keras.layers.Dense(3, activation="tanh"), traced)

    def loss_of(model: keras.Model) -> float:
        caplog.clear()
        return float(model.train_on_batch(rows(7, 6), rows(7, 2, seed=1)))

    def said() -> list[str]:
        return [text for text in caplog.messages if "add_loss inside of a tf.function" in text]

    def regularised() -> keras.Model:
        return chain(
            lambda: keras.layers.Dense(3), lambda: TracedDense(3, activity_regularizer="l2")
        )

    # Keras adds that of an activity regulariser outside of the call.
    bare, parallel = pair(regularised, 3, optimizer="sgd", loss="mse")
    assert loss_of(parallel) == pytest.approx(loss_of(bare), rel=1e-5)
    assert not said()
    bare, alone = pair(build, 1, optimizer="sgd", loss="mse")
    assert loss_of(alone) == pytest.approx(loss_of(bare), rel=1e-5)
    untraced, _ = pair(adds(term), 3, optimizer="sgd", loss="mse")
    _, parallel = pair(build, 3, optimizer="sgd", loss="mse")
    expected = loss_of(untraced)
    assert not said()
    assert loss_of(parallel) == pytest.approx(expected, rel=1e-5)
    assert len(said()) == 1
    assert ("adds" if nested else "traced") in said()[0]
