"""Real models against the bare template."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

import parallel_keras as pk
from tests.parity import assert_same_fit, pair, rng, rows, scale

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.01, momentum=0.9)}
# Far below what float32 could tell apart, far above what float64 rounds in these nets.
DEEP = 1e-7


@pytest.fixture
def float64() -> Iterator[None]:
    """Models made in this test compute in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def application(name: str, size: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classes=5
        )
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True  # by shard it is another number, as documented
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0  # each tower draws for itself, as documented
        return model

    return build


@pytest.mark.rest
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Xception", 71),
        ("MobileNetV3Small", 32),
        ("EfficientNetV2B0", 32),
        ("ResNet50V2", 32),
        ("ConvNeXtTiny", 32),
        ("DenseNet121", 32),
    ],
)
def test_applications(name: str, size: int) -> None:
    """One step of training on 4 + 3 rows, then predictions of 5.

    In float64: at these sizes the deep layers normalise 7 numbers, which turns the rounding of
    float32 into differences that say nothing about what is computed.
    """
    x = rows(7, size, size, 3).astype("float64")
    y = keras.utils.to_categorical(rng(1).integers(0, 5, 7), 5)
    bare, parallel = pair(application(name, size), 2, loss="categorical_crossentropy", **SGD)
    losses = [model.train_on_batch(x, y) for model in (bare, parallel)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=DEEP)
    for one, other in zip(bare.variables, parallel.variables, strict=True):
        np.testing.assert_allclose(
            other.numpy(), one.numpy(), rtol=DEEP, atol=DEEP * scale(one), err_msg=one.path
        )
    np.testing.assert_allclose(
        parallel.predict_on_batch(x[:5]), bare.predict_on_batch(x[:5]), rtol=DEEP, atol=DEEP
    )


def transformer() -> keras.Model:
    """An encoder and a decoder with attention over it, masks included."""
    source = keras.Input((6,), dtype="int32", name="source")
    target = keras.Input((5,), dtype="int32", name="target")
    embed = keras.layers.Embedding(30, 8, mask_zero=True)

    def block(x: Any, memory: Any = None, causal: bool = False) -> Any:
        attend = keras.layers.MultiHeadAttention(2, 4)
        x = keras.layers.LayerNormalization()(x + attend(x, x, use_causal_mask=causal))
        if memory is not None:
            cross = keras.layers.MultiHeadAttention(2, 4)
            x = keras.layers.LayerNormalization()(x + cross(x, memory))
        hidden = keras.layers.Dense(16, activation="relu")(x)
        return keras.layers.LayerNormalization()(x + keras.layers.Dense(8)(hidden))

    memory = block(embed(source))
    decoded = block(embed(target), memory, causal=True)
    return keras.Model([source, target], keras.layers.Dense(30)(decoded))


def test_transformer() -> None:
    tokens = (
        rng().integers(0, 30, (10, 6)).astype("int32"),
        rng(1).integers(0, 30, (10, 5)).astype("int32"),
    )
    y = rng(2).integers(0, 30, (10, 5))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    bare, parallel = pair(transformer, 3, loss=loss, metrics=["accuracy"], **SGD)
    assert_same_fit(bare, parallel, list(tokens), y, batch_size=7, epochs=2)


def siamese() -> keras.Model:
    """C2: one encoder, called twice."""
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    encoder = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)])
    distance = keras.layers.Lambda(lambda pair: abs(pair[0] - pair[1]))
    score = keras.layers.Dense(1, activation="sigmoid", name="score")
    return keras.Model([left, right], score(distance([encoder(left), encoder(right)])))


def test_siamese() -> None:
    x = {"left": rows(10, 6), "right": rows(10, 6, seed=1)}
    y = rng(2).integers(0, 2, (10, 1)).astype("float32")
    bare, parallel = pair(siamese, 4, loss="binary_crossentropy", metrics=["accuracy"], **SGD)
    assert_same_fit(bare, parallel, x, y, batch_size=7, epochs=2)


def recurrent() -> keras.Model:
    tokens = keras.Input((7,), dtype="int32")
    hidden = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    hidden = keras.layers.Bidirectional(keras.layers.LSTM(6, return_sequences=True))(hidden)
    return keras.Model(tokens, keras.layers.Dense(1)(keras.layers.GRU(5)(hidden)))


def test_recurrent_with_masks() -> None:
    x = rng().integers(0, 4, (10, 7)).astype("int32")
    bare, parallel = pair(recurrent, 3, loss="mse", **SGD)
    assert_same_fit(bare, parallel, x, rows(10, 1), batch_size=7, epochs=2)


class Sampling(keras.Model):
    """A variational autoencoder whose noise comes with the data, so that it can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_variance = keras.layers.Dense(3), keras.layers.Dense(3)
        self.decoder = keras.layers.Dense(6)

    def call(self, inputs: dict[str, Any]) -> Any:
        mean, log_variance = self.mean(inputs["x"]), self.log_variance(inputs["x"])
        spread = keras.ops.exp(log_variance)
        divergence = keras.ops.sum(keras.ops.square(mean) + spread - log_variance - 1, axis=-1)
        self.add_loss(0.5 * keras.ops.mean(divergence))
        return self.decoder(mean + keras.ops.sqrt(spread) * inputs["noise"])


def test_variational_autoencoder() -> None:
    """N7: https://github.com/keras-team/keras/issues/9178."""
    x, noise = rows(10, 6), rows(10, 3, seed=1)
    for towers in (2, 3):
        bare, parallel = pair(Sampling, towers, loss="mse", **SGD)
        assert_same_fit(bare, parallel, {"x": x, "noise": noise}, x, batch_size=7, epochs=2)


@pytest.mark.rest
@pytest.mark.timeout(600)
def test_historical_example(tmp_path: Any) -> None:
    """The documented use of multi_gpu_model, as in the README, at a small size."""
    height = width = 71
    num_samples, num_classes = 16, 10
    model = keras.applications.Xception(
        weights=None, input_shape=(height, width, 3), classes=num_classes
    )
    devices = [f"CPU:{index}" for index in range(8)]
    parallel_model = pk.multi_gpu_model(model, gpus=devices)
    parallel_model.compile(loss="categorical_crossentropy", optimizer="rmsprop")
    x = rng().random((num_samples, height, width, 3))
    y = rng(1).random((num_samples, num_classes))
    before = model.get_weights()[0]
    history = parallel_model.fit(x, y, epochs=1, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert not np.array_equal(model.get_weights()[0], before)
    path = str(tmp_path / "my_model.h5")
    model.save(path)
    reloaded = keras.models.load_model(path)
    np.testing.assert_allclose(
        reloaded.predict(x[:3], verbose=0), parallel_model.predict(x[:3], verbose=0), rtol=1e-4
    )
