"""Trains on several machines: the same script on each of them.

Try it on one machine, with two workers:

    python -m parallel_keras workers 2 docs/examples/several_machines.py --small

On a cluster, whatever starts the script sets the environment variable TF_CONFIG (Kubernetes
operators, Ray Train and SageMaker do). Batches are those of all machines together: each worker
reads the same data and takes its rows.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import parallel_keras as pk


def build() -> keras.Model:
    """Any model, built outside of the strategy's scope."""
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)]
    )


def train(small: bool = False) -> keras.callbacks.History:
    """Trains; must be called before anything else uses TensorFlow."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    random = np.random.default_rng(0)
    x = random.normal(size=(60 if small else 10_000, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    keras.utils.set_random_seed(0)
    parallel = pk.DataParallelModel(build(), strategy=strategy)
    parallel.compile("adam", "mse")
    history = parallel.fit(
        x, y, batch_size=20 if small else 256, epochs=2 if small else 10,
        # A worker that was killed and started again goes on where all of them were.
        callbacks=[keras.callbacks.BackupAndRestore("backup")],
        verbose=0 if small else "auto",
    )  # fmt: skip
    parallel.save("several_machines.keras")  # one worker writes it
    return history


def main(_: list[str]) -> None:
    """Runs the example."""
    train(flags.FLAGS.small)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Train a tiny network for a moment.")
    app.run(main)
