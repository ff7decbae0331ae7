"""Learns which document answers a query, with the other rows of the batch as wrong answers.

The loss compares each query with all documents of the batch. Its value depends on the whole batch,
not on one device's rows: `loss_on="auto"` sees that it is no loss it knows, and merges the outputs
first. So a batch of 256 on four devices has 255 wrong answers for each query, as on one device.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from absl import app, flags

import parallel_keras as pk


def in_batch_negatives(_: Any, pairs: Any) -> Any:
    """Cross-entropy of the own document among all of the batch, for each query.

    Args:
        pairs: Tensor of shape `(rows, 2, width)`, queries and documents.
    """
    queries, documents = pairs[:, 0], pairs[:, 1]
    scores = 10 * keras.ops.matmul(queries, keras.ops.transpose(documents))
    own = keras.ops.arange(keras.ops.shape(scores)[0])
    return keras.losses.sparse_categorical_crossentropy(own, scores, from_logits=True)


def build(vocabulary: int, length: int, width: int) -> keras.Model:
    """Two encoders side by side."""
    inputs, vectors = {}, []
    for name in ("query", "document"):
        inputs[name] = keras.Input((length,), dtype="int32", name=name)
        words = keras.layers.Embedding(vocabulary, width)(inputs[name])
        vector = keras.layers.Dense(width)(keras.layers.GlobalAveragePooling1D()(words))
        vectors.append(keras.layers.UnitNormalization()(vector))
    return keras.Model(inputs, keras.ops.stack(vectors, axis=1))


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains on queries that are shuffled documents."""
    rows, vocabulary, length = (64, 40, 4) if small else (50_000, 5_000, 12)
    random = np.random.default_rng(0)
    documents = random.integers(0, vocabulary, (rows, length))
    queries = random.permuted(documents, axis=1)
    parallel = pk.DataParallelModel(build(vocabulary, length, 16 if small else 128), devices)
    parallel.compile(optimizer=keras.optimizers.Adam(1e-2), loss=in_batch_negatives)
    print(f"merged first: {parallel.loss_path.reason}")
    return parallel.fit(
        {"query": queries, "document": documents},
        np.zeros(rows),  # Keras wants targets; the loss does not look at them.
        batch_size=32 if small else 256,
        epochs=3 if small else 5,
        verbose=0 if small else "auto",
    )


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
