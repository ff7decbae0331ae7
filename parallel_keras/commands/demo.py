"""Trains a small network on handwritten digits, once on one device and once on all of them.

It uses every GPU, or, where there is none, two logical CPUs. It prints how far the two runs are
apart and how long they took, saves the network through the wrapper as digits.keras, evaluates that
file in a process that cannot import parallel_keras, and draws demo.png. It fails if the two runs
differ by more than rounding, or if the file does not do as well as the network that was saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
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
from absl import flags, logging

import parallel_keras as pk
from parallel_keras.commands import CommandError
from parallel_keras.commands.comparison import Array, Comparison, Run, Score
from parallel_keras.commands.machine import choose_devices

_EPOCHS = flags.DEFINE_integer(
    "epochs",
    12,
    "How many epochs to train for; the first does not count for the time per epoch.",
    lower_bound=2,
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "How many devices to use. By default, all GPUs, or two logical CPUs if there is no GPU.",
    lower_bound=1,
)
_JSON = flags.DEFINE_bool("json", False, "Print the results as JSON, and nothing else.")
_OUTPUT_DIR = flags.DEFINE_string("output-dir", ".", "Where to write digits.keras and demo.png.")

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


def _require_extra() -> None:
    missing = [
        package
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise CommandError(
            f"The demo also needs {' and '.join(missing)}. "
            'Install: pip install "parallel_keras[demo]"'
        )


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


def _folder() -> Path:
    folder = Path(_OUTPUT_DIR.value).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"Cannot make the folder for the results: {error.strerror}. "
            f"Received: --output-dir={_OUTPUT_DIR.value}. Name a folder that can be written to."
        ) from error
    return folder


def _run(folder: Path) -> Comparison:
    devices = choose_devices(_DEVICES.value)
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
    one, every, parallel = _train_both(devices, digits, _EPOCHS.value)
    model_file = folder / "digits.keras"
    parallel.save(model_file)
    found = Comparison(tuple(devices), one, every, _evaluate_alone(model_file, digits))
    print(f"\n{found}\nWritten: {model_file}", flush=True)
    return found


def main() -> None:
    """Runs the demo."""
    _require_extra()
    folder = _folder()
    # With --json, what is for people goes to the other stream.
    with contextlib.redirect_stdout(sys.stderr if _JSON.value else sys.stdout):
        found = _run(folder)
        found.draw(folder / "demo.png")
        print(f"Written: {folder / 'demo.png'}", flush=True)
    if _JSON.value:
        print(json.dumps(found.as_dict()))
    found.check()
