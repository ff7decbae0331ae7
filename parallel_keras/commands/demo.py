"""Trains a small network on handwritten digits, once on one device and once on all of them.

It uses every GPU, or, where there is none, two logical CPUs. It prints how far the two runs are
apart and how long they took, saves the network through the wrapper as digits.keras, evaluates that
file in a process that cannot import parallel_keras, and draws demo.png. It fails if the two runs
differ by more than rounding, or if the file does not do as well as the network that was saved.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from absl import flags, logging

import parallel_keras as pk
from parallel_keras.commands import CommandError

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
_OUTPUT_DIR = flags.DEFINE_string("output-dir", ".", "Where to write digits.keras and demo.png.")

BATCH_SIZE: Final = 128
SEED: Final = 1
FEWEST_CORRECT: Final = 0.97

# Both runs do the same sums, but in another order: one adds up the gradients of 128 images, the
# other those of each share and then the shares. In float32 that moves a weight by about 1e-8 in a
# step, and the following steps amplify it.
WEIGHT_TOLERANCE: Final = 1e-5
LOSS_TOLERANCE: Final = 1e-5

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

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images of handwritten digits and what they show, for training and for testing."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


@dataclasses.dataclass(frozen=True)
class Score:
    """Loss and accuracy of a network on some images."""

    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of one training."""

    losses: list[float]
    seconds: list[float]
    weights: list[Array]
    train: Score
    test: Score

    @property
    def seconds_per_epoch(self) -> float:
        """The median without the first epoch, which also traces the step and warms up."""
        return statistics.median(self.seconds[1:])


class _Stopwatch(keras.callbacks.Callback):
    """Takes the time of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
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


def _choose_devices(count: int | None) -> list[str]:
    """Returns the devices to train on; has to be called before TensorFlow starts its runtime."""
    gpus = len(tf.config.list_physical_devices("GPU"))
    if not gpus:
        # One thread for each operation makes a logical CPU use about one core, as a GPU that is
        # added brings cores of its own. The towers' operations run beside each other.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(2 * (count or 2))
        return list(pk.virtual_devices(count or 2))
    if count and count > gpus:
        raise CommandError(
            f"There are not as many GPUs as asked for. Expected: at most {gpus}. "
            f"Received: --devices={count}. Leave the flag out to use all of them."
        )
    # By default recent GPUs round the inputs of convolutions to 10 bits. The two runs would then
    # differ by that, where this is to show that they do not differ.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return [f"/device:GPU:{index}" for index in range(count or gpus)]


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


def _weight_difference(one: Run, every: Run) -> float:
    return max(
        float(np.max(np.abs(ours - theirs)))
        for ours, theirs in zip(one.weights, every.weights, strict=True)
    )


def _loss_difference(one: Run, every: Run) -> float:
    """Returns the largest difference of two losses, relative to that on one device."""
    losses = [(*run.losses, run.train.loss, run.test.loss) for run in (one, every)]
    return max(abs(ours / theirs - 1) for theirs, ours in zip(*losses, strict=True))


def _table(one: Run, every: Run, devices: list[str]) -> str:
    rows = [
        ("", "one device", f"{len(devices)} device(s)"),
        ("loss, train", f"{one.train.loss:.6f}", f"{every.train.loss:.6f}"),
        ("loss, test", f"{one.test.loss:.6f}", f"{every.test.loss:.6f}"),
        ("accuracy, train", f"{one.train.accuracy:.4f}", f"{every.train.accuracy:.4f}"),
        ("accuracy, test", f"{one.test.accuracy:.4f}", f"{every.test.accuracy:.4f}"),
        ("seconds per epoch", f"{one.seconds_per_epoch:.2f}", f"{every.seconds_per_epoch:.2f}"),
    ]
    lines = [f"{name:<20}{left:>14}{right:>14}" for name, left, right in rows]
    speed_up = one.seconds_per_epoch / every.seconds_per_epoch
    return "\n".join(
        [
            *lines,
            "",
            f"Largest weight difference: {_weight_difference(one, every):.1e} "
            f"(allowed: {WEIGHT_TOLERANCE:.0e})",
            f"Largest loss difference:   {_loss_difference(one, every):.1e}, relative "
            f"(allowed: {LOSS_TOLERANCE:.0e})",
            f"Speed-up:                  {speed_up:.2f} "
            "(the median seconds per epoch, without the first epoch)",
        ]
    )


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


def _draw(one: Run, every: Run, devices: list[str], path: Path) -> None:
    from matplotlib import figure, ticker

    # A Figure of its own, not pyplot: that needs no display, and leaves no global state behind.
    drawing = figure.Figure(figsize=(9, 4), layout="constrained")
    losses, times = drawing.subplots(1, 2, width_ratios=(3, 2))
    epochs = range(1, len(one.losses) + 1)
    names = ("one device", f"{len(devices)} device(s)")

    # The curves coincide: only with a broad one below can both be seen.
    losses.plot(epochs, one.losses, color="C0", linewidth=6, alpha=0.4, label=names[0])
    losses.plot(epochs, every.losses, color="C1", linewidth=1.5, label=names[1])
    losses.set(title="Training loss", xlabel="Epoch", yscale="log")
    losses.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    losses.grid(alpha=0.3)
    losses.legend()

    seconds = (one.seconds_per_epoch, every.seconds_per_epoch)
    bars = times.bar(names, seconds, color=("C0", "C1"), alpha=0.8, width=0.6)
    times.bar_label(bars, fmt="%.2f s", padding=2)
    times.margins(y=0.12)
    times.set(
        title=f"Time per epoch: {seconds[0] / seconds[1]:.2f} times as fast",
        ylabel="Seconds (median, without the first epoch)",
    )
    drawing.savefig(path, dpi=150)


def _check(one: Run, every: Run, alone: Score) -> None:
    """Raises an error if something that the demo shows does not hold."""
    if (difference := _weight_difference(one, every)) > WEIGHT_TOLERANCE:
        raise CommandError(
            "The weights differ by more than rounding. "
            f"Expected: at most {WEIGHT_TOLERANCE:.0e}. Received: difference={difference:.1e}. "
            "Please report this, with your versions of Keras and TensorFlow."
        )
    if (difference := _loss_difference(one, every)) > LOSS_TOLERANCE:
        raise CommandError(
            "The losses differ by more than rounding. "
            f"Expected: at most {LOSS_TOLERANCE:.0e}. Received: difference={difference:.1e}. "
            "Please report this, with your versions of Keras and TensorFlow."
        )
    if (difference := abs(alone.loss / every.test.loss - 1)) > LOSS_TOLERANCE:
        raise CommandError(
            "The saved file is not the network that was saved: its test loss is another. "
            f"Expected: {every.test.loss:.6f}. Received: loss={alone.loss:.6f}. "
            "Please report this, with your versions of Keras and TensorFlow."
        )
    if alone.accuracy < FEWEST_CORRECT:
        raise CommandError(
            "The network has not learnt enough. "
            f"Expected: a test accuracy of at least {FEWEST_CORRECT}. "
            f"Received: accuracy={alone.accuracy:.4f}. Train for longer, with a higher --epochs."
        )


def main() -> None:
    """Runs the demo."""
    _require_extra()
    folder = Path(_OUTPUT_DIR.value).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"Cannot make the folder for the results: {error.strerror}. "
            f"Received: --output-dir={_OUTPUT_DIR.value}. Name a folder that can be written to."
        ) from error
    devices = _choose_devices(_DEVICES.value)
    digits = _load_digits()
    logging.info(
        "%d images to train on, %d to test on; batches of %d",
        len(digits.train_images),
        len(digits.test_images),
        BATCH_SIZE,
    )
    one, every, parallel = _train_both(devices, digits, _EPOCHS.value)
    print(f"\n{_table(one, every, devices)}\n", flush=True)

    model_file, picture = folder / "digits.keras", folder / "demo.png"
    parallel.save(model_file)
    alone = _evaluate_alone(model_file, digits)
    print(
        f"{model_file.name}, in a process without parallel_keras: "
        f"test loss {alone.loss:.6f}, test accuracy {alone.accuracy:.4f}"
    )
    _draw(one, every, devices, picture)
    print(f"Written: {model_file}, {picture}", flush=True)
    _check(one, every, alone)
