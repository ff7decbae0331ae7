"""A worker that trains slowly, so that something can happen to it meanwhile."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from tests.worker_cases import mlp, rows

EPOCHS = 3
FAILED = 3


class Progress(keras.callbacks.Callback):
    """Says where training is, and takes its time."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self._pause, self._epoch = pause, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        print(f"epoch {self._epoch} batch {batch}", flush=True)
        time.sleep(self._pause)


def data() -> tuple[np.ndarray, np.ndarray]:
    return rows(22, 6), rows(22, 3, seed=1)


def train(model: keras.Model, callbacks: list[Any], *, backwards: bool = False) -> None:
    """Six batches an epoch, the last one smaller."""
    model.compile("adam", "mse")
    x, y = (array[:: -1 if backwards else 1] for array in data())
    model.fit(x, y, batch_size=4, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=callbacks)


def die_while_writing(name: str, times: int) -> None:
    """Kills this process when it is about to replace or to open a file, not for the first time."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "os.rename" or (event == "open" and "w" in str(arguments[1]))
        path = arguments[1] if event == "os.rename" else arguments[0]
        if writes and str(path).endswith(name):
            seen.append(name)
            if len(seen) == times:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def worker(settings: dict[str, Any]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    pk.virtual_devices(2)
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=settings["timeout"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    index, folder = strategy.cluster_resolver.task_id, Path(settings["folder"])
    wrong = settings.get("wrong") if index == 1 else None
    template = mlp(4 if wrong == "template" else 3)
    model = pk.DataParallelModel(template, settings["towers"], strategy=strategy)
    if index == 0 and "dies_writing" in settings:
        die_while_writing(settings["dies_writing"], 2)
    callbacks = [Progress(settings["pause"])]
    if settings.get("backup"):
        callbacks.append(keras.callbacks.BackupAndRestore(settings["backup"]))
    train(model, callbacks, backwards=wrong == "batches")
    weights = [variable.numpy() for variable in template.variables]
    np.savez(folder / f"worker_{index}.npz", *weights)


def main() -> None:
    try:
        worker(json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 (the test judges it)
        print(f"{time.time()} {type(error).__name__}: {error}", flush=True)
        print("failed", flush=True)
        os._exit(FAILED)


if __name__ == "__main__":
    main()
