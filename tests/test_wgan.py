"""Two models that train against each other, each on several devices."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from tests.parity import rows

STEPS, ROWS = 10, 7
REAL, NOISE, MIX = rows(ROWS, 4), rows(ROWS, 3, seed=1), np.linspace(0, 1, ROWS)[:, None]


def dense(inputs: int, units: int) -> keras.Model:
    layers = [keras.Input((inputs,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(units)]
    return keras.Sequential(layers)


def train(towers: int) -> tuple[list[Any], list[np.ndarray]]:
    """Ten steps of a Wasserstein GAN with gradient penalty; 0 towers: bare models."""
    keras.utils.set_random_seed(7)
    templates = [dense(3, 4), dense(4, 1)]
    models = [pk.DataParallelModel(t, towers) if towers else t for t in templates]
    generator, critic = models
    optimizers = [keras.optimizers.Adam(0.01) for _ in models]

    @tf.function
    def step() -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            fake = generator(NOISE, training=True)
            mixed = tf.cast(MIX, tf.float32) * REAL + tf.cast(1 - MIX, tf.float32) * fake
            with tf.GradientTape() as inner:
                inner.watch(mixed)
                scores = critic(mixed, training=True)
            slopes = tf.norm(inner.gradient(scores, mixed), axis=1)
            judged = tf.reduce_mean(critic(fake)) - tf.reduce_mean(critic(REAL))
            loss = judged + 10.0 * tf.reduce_mean(tf.square(slopes - 1.0))
        apply(optimizers[1], tape, loss, critic)
        with tf.GradientTape() as tape:
            fooled = -tf.reduce_mean(critic(generator(NOISE, training=True)))
        apply(optimizers[0], tape, fooled, generator)
        return loss, fooled

    def apply(optimizer: Any, tape: tf.GradientTape, loss: tf.Tensor, model: keras.Model) -> None:
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        gradients = [
            tf.zeros_like(v.value) if g is None else g
            for g, v in zip(gradients, variables, strict=True)
        ]
        optimizer.apply(gradients, variables)

    for optimizer, model in zip(optimizers, models, strict=True):
        optimizer.build(model.trainable_variables)
    losses = [[float(value) for value in step()] for _ in range(STEPS)]
    return losses, [weight for template in templates for weight in template.get_weights()]


def test_a_wasserstein_gan_of_two_wrapped_models() -> None:
    """C5: https://github.com/keras-team/keras/issues/10841."""
    expected_losses, expected_weights = train(0)
    losses, weights = train(3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
    for one, other in zip(expected_weights, weights, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
