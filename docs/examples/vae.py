"""A variational autoencoder: a model with a `train_step` of its own.

The step is the usual one of Keras' examples. Wrapped, its calls of the encoder and of the decoder
run on all devices, and the loss in between is that of the whole batch.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import parallel_keras as pk


class VariationalAutoencoder(keras.Model):
    """Encodes rows as normal distributions, and decodes draws from them."""

    def __init__(self, width: int, latent: int, hidden: int) -> None:
        super().__init__()
        rows = keras.Input((width,))
        x = keras.layers.Dense(hidden, activation="relu")(rows)
        statistics = keras.layers.Dense(latent)(x), keras.layers.Dense(latent)(x)
        self.encoder = keras.Model(rows, statistics, name="encoder")
        self.decoder = keras.Sequential(
            [
                keras.Input((latent,)),
                keras.layers.Dense(hidden, activation="relu"),
                keras.layers.Dense(width),
            ],
            name="decoder",
        )
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.seeds = keras.random.SeedGenerator(0)
        self.built = True

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What is reported, and reset at the beginning of each epoch."""
        return [self.loss_tracker]

    def call(self, rows: Any) -> Any:
        """What the rows are decoded to, from the middle of their distributions."""
        mean, _ = self.encoder(rows)
        return self.decoder(mean)

    def train_step(self, rows: Any) -> dict[str, Any]:
        """One step."""
        with tf.GradientTape() as tape:
            mean, log_variance = self.encoder(rows, training=True)
            noise = keras.random.normal(tf.shape(mean), seed=self.seeds)
            decoded = self.decoder(mean + tf.exp(log_variance / 2) * noise, training=True)
            error = tf.reduce_sum(tf.square(rows - decoded), axis=1)
            excess = tf.exp(log_variance) + tf.square(mean) - 1 - log_variance
            loss = tf.reduce_mean(error + tf.reduce_sum(excess, axis=1) / 2)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains on rows that lie on a circle."""
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, (64 if small else 20_000, 1))
    rows = np.cos(angles + np.arange(16)).astype("float32")
    parallel = pk.DataParallelModel(VariationalAutoencoder(16, 2, 16 if small else 256), devices)
    parallel.compile(optimizer=keras.optimizers.Adam(1e-2))
    return parallel.fit(
        rows, batch_size=32 if small else 512, epochs=3 if small else 20,
        verbose=0 if small else "auto",
    )  # fmt: skip


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
