"""Trains a new head on a frozen base, then all of it with a small learning rate.

`trainable` is a property of the layers of your model. Set it there, before or after wrapping, and
compile again: the wrapper has no other weights than your model.
"""

from __future__ import annotations

import keras
import numpy as np
from absl import app, flags

import parallel_keras as pk


def build_base(width: int) -> keras.Model:
    """Stands for a network with weights that were trained elsewhere."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(width, 3, activation="relu"), keras.layers.BatchNormalization()]
    return keras.Sequential(
        [keras.Input((16, 16, 3)), *layers, keras.layers.GlobalAveragePooling2D()], name="base"
    )


def train(small: bool = False, devices: int | None = None) -> keras.callbacks.History:
    """Trains in two phases; the base must not change in the first."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64 if small else 5_000, 16, 16, 3)).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype("float32")[:, None]

    base = build_base(4 if small else 64)
    base.trainable = False
    inputs = keras.Input((16, 16, 3))
    # Frozen or not, normalisation with training=False keeps the statistics that it came with.
    features = base(inputs, training=False)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(features))
    before = [weight.copy() for weight in base.get_weights()]

    parallel = pk.DataParallelModel(model, devices)
    options = {"batch_size": 32, "epochs": 2, "verbose": 0 if small else "auto"}
    parallel.compile("adam", "binary_crossentropy")
    parallel.fit(x, y, **options)
    for weight, value in zip(base.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)

    base.trainable = True
    parallel.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy")
    return parallel.fit(x, y, **options)


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
