"""Data from anywhere that Keras takes it from; callbacks that see what one device shows them."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, assert_same_variables, mlp, pair, rows

X, Y = rows(13, 6), rows(13, 3, seed=1)


def two() -> tuple[keras.Model, pk.DataParallelModel]:
    return pair(mlp, 4, optimizer=lambda: keras.optimizers.SGD(0.05), loss="mse", metrics=["mae"])


class Source(keras.utils.PyDataset):
    """Batches of 7, 6 and 5 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs_ended = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return rows(7 - index, 6, seed=index), rows(7 - index, 3, seed=10 + index)

    def on_epoch_end(self) -> None:
        self.epochs_ended += 1


def test_datasets_of_keras() -> None:
    """C9: https://github.com/tensorflow/tensorflow/issues/33725. Epochs end as often."""
    models, sources = two(), (Source(), Source())
    for model, source in zip(models, sources, strict=True):
        model.fit(source, epochs=3, verbose=0, shuffle=False)
    # Once for each epoch; some versions of Keras tell of one more before the first.
    assert sources[0].epochs_ended == sources[1].epochs_ended
    assert sources[1].epochs_ended in (3, 4)
    assert_same_variables(*models)


def test_generators() -> None:
    """C9: https://github.com/tensorflow/tensorflow/issues/33725."""
    models, source = two(), Source()
    for model in models:
        generator = (source[index % 3] for index in range(6))
        model.fit(generator, steps_per_epoch=3, epochs=2, verbose=0, shuffle=False)
    assert_same_variables(*models)


@pytest.mark.parametrize("kind", ["array", "tf.data", "validation", "class_weight"])
def test_arrays_and_tf_data(kind: str) -> None:
    """C9: https://github.com/keras-team/keras/issues/15692."""
    if kind == "tf.data":
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
        assert_same_fit(*two(), data, epochs=2)
    elif kind == "class_weight":
        models = pair(
            mlp, 4, optimizer=lambda: keras.optimizers.SGD(0.05),
            loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )  # fmt: skip
        labels = np.arange(13) % 3
        weight = {0: 1.0, 1: 5.0, 2: 0.2}
        assert_same_fit(*models, X, labels, batch_size=5, epochs=2, class_weight=weight)
    else:
        split = {"validation_split": 0.3} if kind == "validation" else {}
        assert_same_fit(*two(), X, Y, batch_size=5, epochs=2, **split)


class OfTorch(np.ndarray):
    """What a tensor of torch is to Keras."""

    def cpu(self) -> np.ndarray:
        return np.asarray(self)


class DataLoader:
    """Stands in for `torch.utils.data.DataLoader`, by which Keras knows it.

    The real one needs all of torch, gigabytes of it where its default build is for GPUs.
    """

    __module__ = "torch.utils.data.dataloader"
    batch_size = 5
    dataset = X

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(X), self.batch_size):
            rows_ = slice(start, start + self.batch_size)
            yield [X[rows_].view(OfTorch), Y[rows_].view(OfTorch)]


def test_loaders_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """C9: https://github.com/keras-team/keras/issues/15692."""
    data = types.SimpleNamespace(DataLoader=DataLoader)
    torch = types.ModuleType("torch")
    torch.Tensor, torch.utils = OfTorch, types.SimpleNamespace(data=data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    models = two()
    for model in models:
        model.fit(DataLoader(), epochs=2, verbose=0, shuffle=False)
    by_array, _ = two()
    by_array.fit(X, Y, batch_size=5, epochs=2, verbose=0, shuffle=False)
    for reference in (models[0], by_array):
        assert_same_variables(reference, models[1])


class Watch(keras.callbacks.Callback):
    """Keeps every value that it is given, and what the model predicts meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen += logs.values()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen += [*logs.values(), self.model.predict(X[:3], verbose=0)]


CALLBACKS: dict[str, Any] = {
    "CSVLogger": lambda folder: keras.callbacks.CSVLogger(str(folder / "log.csv")),
    "EarlyStopping": lambda folder: keras.callbacks.EarlyStopping(
        "loss", patience=1, mode="max", restore_best_weights=True
    ),
    "LambdaCallback": lambda folder: keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (folder / f"{epoch}").write_text(f"{logs['loss']:.4f}")
    ),
    "LearningRateScheduler": lambda folder: keras.callbacks.LearningRateScheduler(
        lambda epoch, rate: rate * 0.5
    ),
    "ReduceLROnPlateau": lambda folder: keras.callbacks.ReduceLROnPlateau(
        "loss", patience=1, mode="max"
    ),
    "SwapEMAWeights": lambda folder: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
    "TensorBoard": lambda folder: keras.callbacks.TensorBoard(str(folder), histogram_freq=1),
    "TerminateOnNaN": lambda folder: keras.callbacks.TerminateOnNaN(),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", list(CALLBACKS))
def test_callbacks_do_what_they_do_on_one_device(name: str, tmp_path: Path) -> None:
    """C12: https://github.com/leondgarse/Keras_insightface/issues/68."""
    average = name == "SwapEMAWeights"
    models = pair(
        mlp, 4, loss="mse", metrics=["mae"],
        optimizer=lambda: keras.optimizers.SGD(0.05, use_ema=average, ema_momentum=0.9),
    )  # fmt: skip
    histories, watches, files = [], [], []
    for kind, model in zip(("bare", "parallel"), models, strict=True):
        (tmp_path / kind).mkdir()
        watch = Watch()
        callbacks = [watch, CALLBACKS[name](tmp_path / kind)]
        history = model.fit(
            X, Y, batch_size=5, epochs=3, shuffle=False, verbose=0, callbacks=callbacks
        )
        histories.append(history.history)
        watches.append(watch.seen)
        files.append({path.name for path in (tmp_path / kind).iterdir()})
    assert list(histories[0]) == list(histories[1])
    for key, values in histories[0].items():
        np.testing.assert_allclose(histories[1][key], values, rtol=RTOL, err_msg=key)
    assert files[0] == files[1]
    assert len(watches[0]) == len(watches[1])
    for one, other in zip(*watches, strict=True):
        assert type(one) is type(other)
        assert isinstance(other, (float, np.ndarray, np.floating))
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)
    assert_same_variables(*models)


def test_not_a_number_ends_the_training() -> None:
    """C12: https://github.com/leondgarse/Keras_insightface/issues/68."""
    spoilt = X.copy()
    spoilt[7] = np.nan  # in the second batch, on the third of four towers
    batches = []
    for model in two():
        seen = Watch()
        model.fit(
            spoilt, Y, batch_size=5, epochs=3, verbose=0, shuffle=False,
            callbacks=[keras.callbacks.TerminateOnNaN(), seen],
        )  # fmt: skip
        batches.append(len(seen.seen))
    assert batches[0] == batches[1]
    assert batches[0] < 3 * 3 * 2
