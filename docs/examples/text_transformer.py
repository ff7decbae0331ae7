"""Trains a small Transformer to predict the next token, with a large vocabulary.

The output has a number for each token of the vocabulary at each position, much more than the
inputs. The loss is one of Keras' own, so the devices compute it, and the outputs never leave them
(`parallel.loss_path` says so). The text is made here: each token is the one before it plus a step.
"""

from __future__ import annotations

import keras
import numpy as np
from absl import app, flags

import parallel_keras as pk


def make_text(count: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of shape `(count, length)`, and the same one position later."""
    random = np.random.default_rng(0)
    start, step = random.integers(0, vocabulary, (count, 1)), random.integers(1, 4, (count, 1))
    tokens = (start + step * np.arange(length + 1)) % vocabulary
    return tokens[:, :-1], tokens[:, 1:]


def build(length: int, vocabulary: int, width: int, blocks: int) -> keras.Model:
    """A decoder: embeddings, blocks of causal attention, a number for each token."""
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width)(tokens)
    x += keras.layers.Embedding(length, width)(keras.ops.arange(length))
    for _ in range(blocks):
        normal = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(4, width // 4)(normal, normal, use_causal_mask=True)
        normal = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(4 * width, activation="gelu")(normal)
        x += keras.layers.Dense(width)(hidden)
    return keras.Model(tokens, keras.layers.Dense(vocabulary)(x))


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains for some epochs."""
    length, vocabulary = (8, 50) if small else (64, 20_000)
    x, y = make_text(64 if small else 20_000, length, vocabulary)
    model = build(length, vocabulary, 16 if small else 256, 1 if small else 4)
    parallel = pk.DataParallelModel(model, devices)
    parallel.compile(
        optimizer=keras.optimizers.AdamW(1e-2 if small else 3e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    print(f"loss on the towers: {parallel.loss_path.reduction is not None}")
    return parallel.fit(
        x, y, batch_size=32, epochs=3 if small else 10, verbose=0 if small else "auto"
    )


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
