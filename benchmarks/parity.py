"""Largest weight difference from one device after 2 epochs: ours and MirroredStrategy's.

Run as `python -m benchmarks.parity`; prints a Markdown table. Everything runs on logical CPUs.
"""

import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import parallel_keras as pk

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 2, "How long each model trains.", lower_bound=1)
flags.DEFINE_list("towers", ["2", "3", "4"], "Numbers of towers.")

# Rows in the dataset and batch size: divisible, a short tail, a tail of one row, tiny batches.
CASES = ((64, 32), (60, 32), (33, 32), (50, 10), (21, 5))


def build() -> keras.Model:
    """A small compiled net without BatchNormalization, with the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return model


def train(model: keras.Model, rows: int, batch_size: int) -> list[np.ndarray]:
    """The weights after training on the same random data in the same order."""
    random = np.random.default_rng(1)
    x = random.normal(size=(rows, 8, 8, 1)).astype("float32")
    y = random.integers(0, 10, rows)
    model.fit(x, y, batch_size=batch_size, epochs=FLAGS.epochs, shuffle=False, verbose=0)
    return model.get_weights()


def difference(weights: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest absolute difference of any weight."""
    return max(np.abs(a - b).max() for a, b in zip(weights, expected, strict=True))


def measure(towers: int) -> None:
    """Prints the rows of the table for one number of towers."""
    names = pk.virtual_devices(towers)
    strategy = tf.distribute.MirroredStrategy(names)
    for rows, batch_size in CASES:
        expected = train(build(), rows, batch_size)
        ours = difference(train(pk.DataParallelModel(build(), towers), rows, batch_size), expected)
        with strategy.scope():
            model = build()
        try:
            theirs = f"{difference(train(model, rows, batch_size), expected):.0e}"
        except tf.errors.InvalidArgumentError:
            # Keras averages the parts of the first batch, which fails if their sizes differ.
            theirs = "fails"
        print(f"| {rows} | {batch_size} | {towers} | {ours:.0e} | {theirs} |", flush=True)


def main(argv: list[str]) -> None:
    """Prints the table; each number of towers in a process of its own.

    Strategies of one process on different devices abort each other's collectives.
    """
    del argv
    if len(FLAGS.towers) == 1:
        measure(int(FLAGS.towers[0]))
        return
    print("| rows | batch | towers | parallel_keras | MirroredStrategy |")
    print("|---:|---:|---:|---:|---:|", flush=True)
    for count in FLAGS.towers:
        arguments = ["--towers", count, "--epochs", str(FLAGS.epochs)]
        subprocess.run([sys.executable, "-m", "benchmarks.parity", *arguments], check=True)


if __name__ == "__main__":
    app.run(main)
