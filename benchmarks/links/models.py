"""What is trained in the laboratory: models by their weights, with as few rows as say something."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

Batch = tuple[np.ndarray, np.ndarray]
SEED = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        about: What it is called in tables.
        build: Makes it.
        loss: The name or object that `compile` takes.
        rows: Rows of the whole batch, for a number of towers.
        batch: Makes inputs and targets of so many rows.
    """

    about: str
    build: Callable[[], keras.Model]
    loss: str
    rows: Callable[[int], int]
    batch: Callable[[np.random.Generator, int], Batch]

    def subject(self, towers: int, rate: float) -> tuple[keras.Model, np.ndarray, np.ndarray]:
        """The compiled model, the same each time, with inputs and targets of one batch."""
        keras.utils.set_random_seed(SEED)
        model = self.build()
        # Plain descent: what an optimizer keeps beside its weights never travels.
        model.compile(keras.optimizers.SGD(rate), self.loss, jit_compile=False)
        return model, *self.batch(np.random.default_rng(SEED), self.rows(towers))


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape).astype("float32")


def _dense(width: int, layers: int) -> keras.Model:
    stack = [keras.layers.Dense(width, activation="relu") for _ in range(layers)]
    return keras.Sequential([keras.Input((width,)), *stack])


def _vectors(width: int) -> Callable[[np.random.Generator, int], Batch]:
    return lambda random, rows: (_normal(random, rows, width), _normal(random, rows, width))


def _xception() -> keras.Model:
    return keras.applications.Xception(
        weights=None, input_shape=(71, 71, 3), classes=100, classifier_activation="softmax"
    )


# The base model of "Attention Is All You Need", with 4 of its 6 layers on one side.
TOKENS, WORDS, HIDDEN, HEADS = 16, 8192, 512, 8


def _transformer() -> keras.Model:
    layers = keras.layers
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(WORDS, HIDDEN)(inputs)
    for _ in range(4):
        attended = layers.MultiHeadAttention(HEADS, HIDDEN // HEADS)(x, x, use_causal_mask=True)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dense(4 * HIDDEN, activation="relu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(HIDDEN)(hidden))
    return keras.Model(inputs, layers.Dense(WORDS, activation="softmax")(x))


MODELS = {
    "mlp": Model(
        "MLP of 16 x 512 x 512",
        lambda: _dense(512, 16),
        "mse",
        lambda towers: 64,
        _vectors(512),
    ),
    # Nothing but messages.
    "small": Model(
        "MLP of 32 x 8 x 8", lambda: _dense(8, 32), "mse", lambda towers: 8, _vectors(8)
    ),
    "xception": Model(
        "Xception 71x71",
        _xception,
        "sparse_categorical_crossentropy",
        lambda towers: towers,
        lambda random, rows: (_normal(random, rows, 71, 71, 3), random.integers(0, 100, rows)),
    ),
    "transformer": Model(
        "Transformer, 4 layers of 512, 8k words",
        _transformer,
        "sparse_categorical_crossentropy",
        lambda towers: towers,
        lambda random, rows: tuple(random.integers(0, WORDS, (2, rows, TOKENS)).astype("int32")),
    ),
}
