"""Backups whose writer died between the two files that they consist of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from parallel_keras import _compat


class TornBackup(keras.callbacks.Callback):
    """Runs after `BackupAndRestore`, which writes the weights first and the epoch after them.

    A process that dies in between leaves new weights beside the old epoch, and Keras would
    train that epoch twice. Then the file of the weights is the newer one, and the optimizer
    has counted the steps of one more epoch; only where both is so, that epoch counts as done.

    Args:
        backup: The `BackupAndRestore`.
    """

    def __init__(self, backup: keras.callbacks.BackupAndRestore) -> None:
        super().__init__()
        self._backup = backup

    def on_train_begin(self, logs: Any = None) -> None:
        """Goes on with the epoch that the weights are for."""
        del logs
        steps, optimizer = (self.params or {}).get("steps"), self.model.optimizer
        if self._backup.save_freq != "epoch" or not steps or optimizer is None:
            return
        written = _epoch_before(str(self._backup.backup_dir))
        if written is not None and int(optimizer.iterations) == steps * (written + 1):
            logging.warning(
                "The backup in %s was not finished: its weights are those after epoch %d, but the "
                "epoch beside them is %d. Training goes on after epoch %d.",
                *(self._backup.backup_dir, written + 1, written, written + 1),
            )
            _compat.set_initial_epoch(self.model, written + 1)


def torn_backups(callbacks: Any) -> list[TornBackup]:
    """A `TornBackup` for each `BackupAndRestore`, to run after it.

    Args:
        callbacks: What `fit` takes for callbacks.

    Returns:
        A list of callbacks.
    """
    given = keras.tree.flatten(callbacks)
    return [TornBackup(one) for one in given if isinstance(one, keras.callbacks.BackupAndRestore)]


def _epoch_before(folder: str) -> int | None:
    """The epoch in a backup whose weights are newer than that; `None` if they are not."""
    weights = tf.io.gfile.join(folder, "latest.weights.h5")
    epoch = tf.io.gfile.join(folder, "training_metadata.json")
    if not tf.io.gfile.exists(weights):
        return None
    if not tf.io.gfile.exists(epoch):
        return 0
    if _written(weights) <= _written(epoch):
        return None
    with tf.io.gfile.GFile(epoch) as file:
        return int(json.load(file)["epoch"])


def _written(path: str) -> int:
    """When a file was written, in nanoseconds; in whole seconds where it is not on a disk."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return int(tf.io.gfile.stat(path).mtime_nsec)
