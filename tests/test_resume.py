"""Training that stops and goes on in another process equals training that never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.steps.first_batch import first_batch
from tests.parity import assert_same_variables, mlp, rows

EPOCHS, STOPS_IN = 5, 3
X, Y = rows(10, 6), rows(10, 3, seed=1)


def compiled() -> keras.Model:
    keras.utils.set_random_seed(7)
    model = mlp()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.8)
    model.compile(keras.optimizers.Adam(schedule), "mse", metrics=["mae"])
    return model


def fit(model: keras.Model, epochs: int, *callbacks: Any, data: Any = None) -> Any:
    x, y = (X, Y) if data is None else (data, None)
    batch_size = 4 if data is None else None
    return model.fit(
        x, y, batch_size=batch_size, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks
    )


class Killed(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch, as the system does: nothing is tidied up."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.epoch == STOPS_IN and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch


class KilledWhileSaving(keras.layers.Layer):
    """Ends the process when most of a file is written."""

    def call(self, x: Any) -> Any:
        return x

    def save_own_variables(self, store: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_be_killed(folder: str) -> None:
    """What the other process does."""
    path = Path(folder)
    model = compiled()
    fit(pk.DataParallelModel(model, 2), 2)
    model.save(path / "half.keras")
    dying = pk.DataParallelModel(keras.Sequential([keras.Input((6,)), KilledWhileSaving()]), 2)
    if os.fork() == 0:  # TensorFlow has no threads there, and nothing to do: it has no weights.
        dying.save(path / "half.keras")
    os.wait()
    backup = keras.callbacks.BackupAndRestore(path / "backup")
    fit(pk.DataParallelModel(compiled(), 3), EPOCHS, backup, Killed())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a process that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    code = (
        "import conftest, sys\n"  # which splits the CPU
        "from tests.test_resume import train_and_be_killed\n"
        "train_and_be_killed(sys.argv[1])\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, timeout=280, cwd=root
    )
    assert done.returncode == -signal.SIGKILL
    return folder


@pytest.mark.sweep(1)
@pytest.mark.parametrize("towers", [3, 2])
def test_resume_in_another_process(killed: Path, towers: int) -> None:
    """S3: https://github.com/keras-team/keras/issues/9197. Also on another number of devices."""
    unbroken = compiled()
    fit(unbroken, EPOCHS)
    resumed = pk.DataParallelModel(keras.saving.load_model(killed / "half.keras"), towers)
    assert int(resumed.optimizer.iterations) == 2 * 3
    fit(resumed, EPOCHS - 2)
    assert int(resumed.optimizer.iterations) == int(unbroken.optimizer.iterations) == EPOCHS * 3
    assert_same_variables(unbroken, resumed)


def test_a_process_killed_while_it_saved_leaves_the_old_file(killed: Path) -> None:
    """And the next save of that file clears away what it left."""
    assert len(list(killed.glob(".half.keras.*.saving"))) == 1
    again = pk.DataParallelModel(keras.saving.load_model(killed / "half.keras"), 2)
    again.save(killed / "half.keras")
    assert sorted(path.name for path in killed.iterdir() if path.name != "backup") == ["half.keras"]


def test_resume_from_a_backup_of_a_killed_process(killed: Path) -> None:
    """F4: https://github.com/tensorflow/tensorflow/issues/84027. On another number of devices."""
    unbroken = compiled()
    expected = fit(unbroken, EPOCHS).history["loss"]
    assert (killed / "backup").exists()
    resumed = pk.DataParallelModel(compiled(), 2)
    history = fit(resumed, EPOCHS, keras.callbacks.BackupAndRestore(killed / "backup"))
    assert history.epoch == list(range(STOPS_IN, EPOCHS))
    np.testing.assert_allclose(history.history["loss"], expected[STOPS_IN:], rtol=1e-5)
    assert_same_variables(unbroken, resumed)
    assert not (killed / "backup").exists()


class Stopped(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise RuntimeError("stopped")


class Source(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


SOURCES = {
    "arrays": lambda: None,
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),
    "PyDataset": Source,
}


def unbuilt() -> keras.Model:
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Dense(7, "tanh"), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.02), "mse")
    return model


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", list(SOURCES))
def test_unbuilt_templates_are_built_before_a_backup_is_restored(kind: str, tmp_path: Path) -> None:
    """F4: https://github.com/tensorflow/tensorflow/issues/84027."""
    data = SOURCES[kind]
    unbroken = unbuilt()
    fit(unbroken, 4, data=data())
    stopped = pk.DataParallelModel(unbuilt(), 3)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(stopped, 4, backup, Stopped(), data=data())
    resumed = pk.DataParallelModel(unbuilt(), 2)
    assert fit(resumed, 4, backup, data=data()).epoch == [2, 3]
    assert_same_variables(unbroken, resumed)


def test_generators_lose_nothing_when_a_template_is_built() -> None:
    """Neither the batch that was looked at, nor its place."""
    models, seen = [unbuilt(), pk.DataParallelModel(unbuilt(), 2)], []
    for model in models:
        taken: list[int] = []

        def generate(taken: list[int] = taken) -> Any:
            for index in range(9):
                taken.append(index)
                yield rows(4, 6, seed=index), rows(4, 3, seed=20 + index)

        model.fit(generate(), steps_per_epoch=3, epochs=2, verbose=0, shuffle=False)
        seen.append(taken)
    assert seen[0][:6] == seen[1][:6] == list(range(6))
    assert_same_variables(*models)


def test_the_first_batch_of_no_data_is_unknown() -> None:
    assert first_batch(x for x in ())[0] is None
    assert list(first_batch(x for x in ())[1]) == []
    assert first_batch([[1.0, 2.0], [3.0, 4.0]])[0] is None
    assert first_batch(None)[0] is None


def test_early_stopping_restores_the_best_weights() -> None:
    bare, parallel = compiled(), pk.DataParallelModel(compiled(), 3)
    stopped = []
    for model in (bare, parallel):
        # The loss falls, so with mode="max" the first epoch stays the best one.
        early = keras.callbacks.EarlyStopping(
            "loss", patience=2, mode="max", restore_best_weights=True
        )
        stopped.append((fit(model, 9, early).epoch, early.best_epoch))
    assert stopped[0] == stopped[1] == ([0, 1, 2], 0)
    assert_same_variables(bare, parallel)
