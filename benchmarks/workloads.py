"""The workloads: a model, its optimizer and loss, and one batch of random data each.

A batch is made once and fed again and again, so that no input pipeline is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

Batch = tuple[np.ndarray, np.ndarray]
SEED = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to train.

    Attributes:
        build: Makes the model, with the same weights each time.
        optimizer: Makes the optimizer.
        loss: The name or object that `compile` takes.
        batch: Makes inputs and targets of one batch.
    """

    build: Callable[[], keras.Model]
    optimizer: Callable[[], keras.optimizers.Optimizer]
    loss: Any
    batch: Callable[[np.random.Generator], Batch]

    def compiled(self, *, jit_compile: bool = False) -> keras.Model:
        """The model, compiled.

        Args:
            jit_compile: Whether by XLA. Not by default: Keras hands a model on one GPU to XLA, but
                none on several, and that would compare compilers.
        """
        keras.utils.set_random_seed(SEED)
        model = self.build()
        model.compile(self.optimizer(), self.loss, jit_compile=jit_compile)
        return model

    def data(self) -> Batch:
        """Inputs and targets of one batch."""
        return self.batch(np.random.default_rng(SEED))


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape).astype("float32")


def _tiny() -> keras.Model:
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((10,)), dense(10, activation="relu"), dense(1)])


def _mlp() -> keras.Model:
    dense = keras.layers.Dense
    hidden = [dense(1024, activation="relu"), dense(1024, activation="relu")]
    return keras.Sequential([keras.Input((784,)), *hidden, dense(10)])


def _cnn() -> keras.Model:
    layers = keras.layers

    def block(filters: int) -> list[keras.layers.Layer]:
        conv = [layers.Conv2D(filters, 3, padding="same", activation="relu") for _ in range(2)]
        return [*conv, layers.MaxPooling2D()]

    body = [*block(32), *block(64), layers.Flatten(), layers.Dense(128, activation="relu")]
    return keras.Sequential([keras.Input((32, 32, 3)), *body, layers.Dense(10)])


def _xception() -> keras.Model:
    return keras.applications.Xception(
        weights=None, input_shape=(71, 71, 3), classes=100, classifier_activation=None
    )


TOKENS, WORDS, WIDTH = 64, 8192, 128


def encoder(tokens: int, words: int) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Inputs and last hidden states of a Transformer encoder of two layers."""
    layers = keras.layers
    inputs = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(words, WIDTH)(inputs)
    for _ in range(2):
        attended = layers.MultiHeadAttention(4, WIDTH // 4)(x, x)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(hidden))
    return inputs, x


def next_word(tokens: int = TOKENS, words: int = WORDS) -> keras.Model:
    """The encoder with a score for every word at every token."""
    inputs, x = encoder(tokens, words)
    return keras.Model(inputs, keras.layers.Dense(words)(x))


def _sentence() -> keras.Model:
    inputs, x = encoder(TOKENS, WORDS)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


ROWS_OF_TABLE, IDS = 200_000, 32


def _embedding() -> keras.Model:
    layers = keras.layers
    ids = keras.Input((IDS,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(ROWS_OF_TABLE, 64)(ids))
    return keras.Model(ids, layers.Dense(1)(layers.Dense(64, activation="relu")(x)))


def _words(random: np.random.Generator) -> Batch:
    x, y = random.integers(0, WORDS, (2, 16, TOKENS)).astype("int32")
    return x, y


def _sentences(random: np.random.Generator) -> Batch:
    x = random.integers(0, WORDS, (32, TOKENS)).astype("int32")
    return x, random.integers(0, 10, 32)


def _classes() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


WORKLOADS = {
    "tiny": Workload(
        _tiny,
        lambda: keras.optimizers.SGD(0.01),
        "mse",
        lambda random: (_normal(random, 32, 10), _normal(random, 32, 1)),
    ),
    "mlp": Workload(
        _mlp,
        lambda: keras.optimizers.Adam(),
        _classes(),
        lambda random: (_normal(random, 1024, 784), random.integers(0, 10, 1024)),
    ),
    "cnn": Workload(
        _cnn,
        lambda: keras.optimizers.Adam(),
        _classes(),
        lambda random: (_normal(random, 128, 32, 32, 3), random.integers(0, 10, 128)),
    ),
    "xception": Workload(
        _xception,
        lambda: keras.optimizers.RMSprop(1e-4),
        _classes(),
        lambda random: (_normal(random, 16, 71, 71, 3), random.integers(0, 100, 16)),
    ),
    "encoder": Workload(
        _sentence,
        lambda: keras.optimizers.Adam(),
        _classes(),
        _sentences,
    ),
    "words": Workload(
        next_word,
        lambda: keras.optimizers.Adam(),
        _classes(),
        _words,
    ),
    "embedding": Workload(
        _embedding,
        # Keras' Adam updates every row of a table at each step; SGD only the rows of the batch.
        lambda: keras.optimizers.SGD(0.01),
        "mse",
        lambda random: (
            random.integers(0, ROWS_OF_TABLE, (1024, IDS)).astype("int32"),
            _normal(random, 1024, 1),
        ),
    ),
}
