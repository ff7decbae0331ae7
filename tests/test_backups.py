"""A backup whose writer died between its two files: the weights, and then the epoch."""

import os
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import parallel_keras as pk
from tests.parity import assert_same_variables, mlp, rows

X, Y = rows(22, 6), rows(22, 3, seed=1)
EPOCHS = 4


def compiled() -> keras.Model:
    keras.utils.set_random_seed(7)
    model = mlp()
    model.compile("adam", "mse")
    return model


def fit(model: keras.Model, epochs: int, *callbacks: Any, **more: Any) -> Any:
    settings = {"batch_size": 4, "verbose": 0, "shuffle": False}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **(settings | more))


class Dies(keras.callbacks.Callback):
    """Keeps the epoch that stood beside the weights before the last backup, and stops there."""

    def __init__(self, folder: Path, epoch: int) -> None:
        super().__init__()
        self._file, self._epoch = folder / "training_metadata.json", epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self._epoch and self._file.exists():
            shutil.copy2(self._file, self._file.with_suffix(".old"))

    def on_train_end(self, logs: Any = None) -> None:
        old = self._file.with_suffix(".old")
        if old.exists():
            shutil.move(old, self._file)
        else:
            self._file.unlink()


def torn(folder: Path, epoch: int) -> None:
    """Weights after this many epochs and one, beside the epoch before them."""
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    fit(compiled(), epoch + 1, backup, Dies(folder, epoch))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_no_epoch_is_trained_twice(
    epoch: int, devices: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F2: killed after the weights were renamed and before the epoch was written."""
    torn(tmp_path, epoch)
    one = compiled()
    fit(one, EPOCHS)
    parallel = pk.DataParallelModel(compiled(), devices)
    with caplog.at_level("WARNING"):
        history = fit(parallel, EPOCHS, keras.callbacks.BackupAndRestore(tmp_path))
    assert history.epoch == list(range(epoch + 1, EPOCHS))
    assert_same_variables(one, parallel)
    assert f"those after epoch {epoch + 1}, but the epoch beside them is {epoch}" in caplog.text


def test_a_whole_backup_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(compiled(), 2, backup)
    parallel = pk.DataParallelModel(compiled(), 3)
    history = fit(parallel, EPOCHS, keras.callbacks.BackupAndRestore(tmp_path))
    assert history.epoch == [2, 3]
    assert "was not finished" not in caplog.text


def test_a_backup_that_was_copied_is_left_alone(tmp_path: Path) -> None:
    """A copy may have its weights written last; the steps that the optimizer counted tell."""
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(compiled(), 2, backup)
    os.utime(tmp_path / "latest.weights.h5")
    history = fit(
        pk.DataParallelModel(compiled(), 2), EPOCHS, keras.callbacks.BackupAndRestore(tmp_path)
    )
    assert history.epoch == [2, 3]


def test_without_a_backup_training_begins_at_the_beginning(tmp_path: Path) -> None:
    parallel = pk.DataParallelModel(compiled(), 2)
    history = fit(parallel, 2, keras.callbacks.BackupAndRestore(tmp_path / "none"))
    assert history.epoch == [0, 1]
    assert np.isfinite(history.history["loss"]).all()
