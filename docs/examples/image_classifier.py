"""Classifies images with a small convolutional network on all devices.

The images are made here: noise, with one bright quarter that is to be named. Put your own arrays,
or a `tf.data.Dataset`, in the place of `make_images`.
"""

from __future__ import annotations

import keras
import numpy as np
from absl import app, flags

import parallel_keras as pk


def make_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of shape `(count, 16, 16, 1)`, and which quarter is bright."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, count)
    images = random.normal(scale=0.3, size=(count, 16, 16, 1)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[row : row + 8, column : column + 8] += 1
    return images, labels


def build(filters: int) -> keras.Model:
    """The network; its normalisation takes the statistics of the whole batch."""
    layers = [keras.Input((16, 16, 1))]
    for factor in (1, 2):
        layers += [
            keras.layers.Conv2D(factor * filters, 3, padding="same"),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(4)])


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains, saves the best weights on the way, and loads them."""
    images, labels = make_images(96 if small else 10_000)
    parallel = pk.DataParallelModel(build(4 if small else 32), devices)
    parallel.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    best = keras.callbacks.ModelCheckpoint("classifier.keras", save_best_only=True)
    history = parallel.fit(
        images,
        labels,
        batch_size=32 if small else 256,
        epochs=3 if small else 10,
        validation_split=1 / 3,
        callbacks=[best],
        verbose=0 if small else "auto",
    )
    model = keras.saving.load_model("classifier.keras")  # a plain Keras model
    print(f"Validation: {model.evaluate(images[-32:], labels[-32:], verbose=0)}")
    return history


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
