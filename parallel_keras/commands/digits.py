"""What the demo trains: a small network on handwritten digits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import parallel_keras as pk
from parallel_keras.commands import CommandError
from parallel_keras.commands.comparison import Array, Comparison, Run, Score

BATCH_SIZE: Final = 128
SEED: Final = 1

# Runs in a process of its own. What it imports cannot come from this library, not even by accident:
# the finder stands before all others, and refuses.
_EVALUATE_ALONE: Final = """
import importlib.abc, json, os, sys
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "parallel_keras":
            raise ModuleNotFoundError("refused: " + name, name=name)

sys.meta_path.insert(0, Refuse())
try:
    import parallel_keras
except ModuleNotFoundError:
    pass
else:
    sys.exit("parallel_keras was importable, so the file was not tested on its own")

import keras, numpy
model_file, data_file = sys.argv[1:]
model = keras.saving.load_model(model_file)
data = numpy.load(data_file)
loss, accuracy = model.evaluate(data["images"], data["labels"], verbose=0)
if "parallel_keras" in sys.modules:
    sys.exit("loading the file imported parallel_keras")
print(json.dumps({"loss": loss, "accuracy": accuracy}))
"""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images of handwritten digits and what they show, for training and for testing."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


class _Stopwatch(keras.callbacks.Callback):
    """Takes the time of each epoch, from the end of its first step to the end of its last.

    Before the first step, tf.data may wait for up to a third of a second while it tunes itself,
    by chance: as long as all steps of an epoch of this data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        if batch == 0:
            self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self.seconds.append(time.perf_counter() - self._start)


def compare(devices: list[str], epochs: int, model_file: Path) -> Comparison:
    """Trains on one device and on all, saves, and evaluates the file by itself.

    Args:
        devices: List of device names.
        epochs: Int, how long to train.
        model_file: Where to save the network.

    Returns:
        The `Comparison`.
    """
    # By default recent GPUs round the inputs of convolutions to 10 bits. The two runs would then
    # differ by that, where this is to show that they do not differ.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    digits = _load_digits()
    logging.info(
        "%d images to train on, %d to test on; batches of %d",
        len(digits.train_images),
        len(digits.test_images),
        BATCH_SIZE,
    )
    one, every, parallel = _train_both(devices, digits, epochs)
    parallel.save(model_file)
    return Comparison(tuple(devices), one, every, _evaluate_alone(model_file, digits))


def _load_digits() -> Digits:
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int32)
    split = model_selection.train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=SEED
    )
    train_images, test_images, train_labels, test_labels = split
    return Digits(train_images, train_labels, test_images, test_labels)


def _build() -> keras.Model:
    """Returns a network whose training is the same on one device and on several.

    Random layers and statistics of the batch would differ by their nature. The activation and the
    pooling are smooth because of rounding: where ReLU or a maximum sits on its kink, the last bit
    of an activation switches a gradient on or off, and within ten epochs two runs on one and the
    same device would be as far apart as two with other seeds.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(64, 3, padding="same", activation="tanh"),
            layers.Conv2D(128, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(128, 3, padding="same", activation="tanh"),
            layers.Flatten(),
            layers.Dense(10),
        ],
        name="digits",
    )


def _compile(model: keras.Model) -> None:
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # By default Keras hands a model on one GPU to XLA, but none on several: the times would
        # then compare compilers, not devices.
        jit_compile=False,
    )


def _score(model: keras.Model, images: Array, labels: Array) -> Score:
    loss, accuracy = model.evaluate(images, labels, batch_size=BATCH_SIZE, verbose=0)
    return Score(float(loss), float(accuracy))


def _train(model: keras.Model, digits: Digits, epochs: int) -> Run:
    _compile(model)
    stopwatch = _Stopwatch()
    history = model.fit(
        digits.train_images,
        digits.train_labels,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        callbacks=[stopwatch],
    )
    return Run(
        losses=history.history["loss"],
        seconds=stopwatch.seconds,
        weights=model.get_weights(),
        train=_score(model, digits.train_images, digits.train_labels),
        test=_score(model, digits.test_images, digits.test_labels),
    )


def _train_both(
    devices: list[str], digits: Digits, epochs: int
) -> tuple[Run, Run, pk.DataParallelModel]:
    """Returns the run on one device, the run on all, and the wrapper that made the latter."""
    # The seed gives both the same first weights, and the same order of the images.
    keras.utils.set_random_seed(SEED)
    print("Training on one device:", flush=True)
    one = _train(_build(), digits, epochs)
    keras.utils.set_random_seed(SEED)
    print(f"Training on {len(devices)} device(s), {', '.join(devices)}:", flush=True)
    parallel = pk.DataParallelModel(_build(), devices)
    return one, _train(parallel, digits, epochs), parallel


def _evaluate_alone(model_file: Path, digits: Digits) -> Score:
    """Evaluates a saved model on the test images, in a process without parallel_keras."""
    with tempfile.TemporaryDirectory() as folder:
        data_file = Path(folder) / "test.npz"
        np.savez(data_file, images=digits.test_images, labels=digits.test_labels)
        process = subprocess.run(
            [sys.executable, "-I", "-c", _EVALUATE_ALONE, str(model_file), str(data_file)],
            # TensorFlow in this process holds the memory of all GPUs.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
            check=False,
        )
    logging.debug("The other process wrote: %s", process.stderr)
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or ["(no message)"])[-1]
        raise CommandError(
            f"A process without parallel_keras could not evaluate {model_file}: {last_line} "
            "(Everything that it wrote: --verbosity=1)"
        )
    return Score(**json.loads(process.stdout.splitlines()[-1]))
