"""A generative adversarial network: two models in turn, in a `train_step` of their own.

Wrapped, each call of the generator and of the discriminator runs on all devices. Nothing else in
the step changes.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import parallel_keras as pk


def network(inputs: int, hidden: int, outputs: int, name: str) -> keras.Model:
    """Two layers."""
    layers = [keras.layers.Dense(hidden, activation="leaky_relu"), keras.layers.Dense(outputs)]
    return keras.Sequential([keras.Input((inputs,)), *layers], name=name)


class GAN(keras.Model):
    """Trains a generator against a discriminator."""

    def __init__(self, width: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.generator = network(latent, hidden, width, "generator")
        self.discriminator = network(width, hidden, 1, "discriminator")
        self.latent = latent
        self.seeds = keras.random.SeedGenerator(0)
        self.judge = keras.losses.BinaryCrossentropy(from_logits=True)
        self.generator_optimizer = keras.optimizers.Adam(1e-2)
        self.generator_optimizer.build(self.generator.trainable_variables)
        self.built = True

    def call(self, noise: Any) -> Any:
        """What the generator makes of noise."""
        return self.generator(noise)

    def train_step(self, real: Any) -> dict[str, Any]:
        """One step of the discriminator, then one of the generator."""
        rows = tf.shape(real)[0]
        noise = keras.random.normal((rows, self.latent), seed=self.seeds)
        ones, zeros = tf.ones((rows, 1)), tf.zeros((rows, 1))
        fake = self.generator(noise, training=True)
        with tf.GradientTape() as tape:
            on_real = self.judge(ones, self.discriminator(real, training=True))
            on_fake = self.judge(zeros, self.discriminator(fake, training=True))
            loss = on_real + on_fake
        weights = self.discriminator.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            fooled = self.judge(ones, self.discriminator(fake, training=True))
        weights = self.generator.trainable_weights
        gradients = tape.gradient(fooled, weights)
        self.generator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"discriminator": loss, "generator": fooled}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Builds the discriminator's optimizer for its weights only."""
        super().compile(*args, **kwargs)
        self.optimizer.build(self.discriminator.trainable_variables)


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains on points of a circle."""
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, 64 if small else 20_000)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("float32")
    parallel = pk.DataParallelModel(GAN(2, 4, 16 if small else 256), devices)
    parallel.compile(optimizer=keras.optimizers.Adam(1e-2))
    return parallel.fit(
        points, batch_size=32 if small else 512, epochs=3 if small else 50,
        verbose=0 if small else "auto",
    )  # fmt: skip


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
