"""What the log says, each thing once."""

import logging
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging

import parallel_keras as pk
from parallel_keras import hardware
from parallel_keras.hardware import Card
from parallel_keras.keras_api import notices
from tests.parity import mlp, rows


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What is logged, INFO included."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger, verbosity = logging.getLogger("absl"), absl_logging.get_verbosity()
    logger.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO)
    yield records
    absl_logging.set_verbosity(verbosity)
    logger.removeHandler(handler)


def warned(log: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in log if record.levelno == logging.WARNING]


def compiled(loss: Any) -> keras.Model:
    model = mlp()
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize(
    ("make", "loss_on", "words"),
    [
        (mlp, "auto", "loss: auto, known after compile()"),
        (mlp, "merged", "loss: merged, as asked for"),
        (lambda: compiled("mse"), "auto", "loss: on the towers"),
        (lambda: compiled(keras.losses.Dice()), "auto", "loss: merged (Dice looks at several rows"),
        (lambda: compiled(keras.losses.Dice()), "towers", "loss: towers, as asked for"),
    ],
)
def test_one_line_when_wrapped(log: Any, make: Any, loss_on: str, words: str) -> None:
    template = make()
    pk.DataParallelModel(template, ["CPU:0", "CPU:2"], loss_on=loss_on)
    [record] = log
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(
        f"DataParallelModel({template.name}): 2 towers on /device:CPU:0, /device:CPU:2; {words}"
    )


def test_one_tower_is_called_so(log: Any) -> None:
    pk.DataParallelModel(mlp(), 1)
    assert "1 tower on /device:CPU:0; " in log[0].getMessage()


def fit(parallel: pk.DataParallelModel, count: int, **kwargs: Any) -> None:
    parallel.compile("sgd", "mse")
    parallel.fit(rows(count, 6), rows(count, 3), verbose=0, **kwargs)


def test_tiny_shards(log: Any) -> None:
    """Wish 7, https://github.com/tensorflow/tensorflow/issues/35687."""
    parallel = pk.DataParallelModel(mlp(), 4)
    fit(parallel, 30, batch_size=15)
    fit(parallel, 30, batch_size=15)
    [message] = warned(log)
    assert message.startswith("A batch of 15 rows gives each of 4 devices fewer than 4, which is")
    assert "larger batch_size" in message


@pytest.mark.parametrize(("towers", "batch"), [(4, 16), (1, 1)])
def test_large_enough_shards(log: Any, towers: int, batch: int) -> None:
    """A last batch that is smaller is nothing that a user should change."""
    fit(pk.DataParallelModel(mlp(), towers), 2 * batch + 1, batch_size=batch)
    assert warned(log) == []


def test_batches_of_a_dataset(log: Any) -> None:
    parallel = pk.DataParallelModel(mlp(), 4)
    parallel.compile("sgd", "mse")
    dataset = tf.data.Dataset.from_tensor_slices((rows(9, 6), rows(9, 3)))
    parallel.fit(dataset.batch(3), shuffle=False, verbose=0)
    assert warned(log) == []  # The size of the first batch is not known before it is read.
    parallel.fit(x=dataset.batch(3, drop_remainder=True), shuffle=False, verbose=0)
    [message] = warned(log)
    assert message.startswith("A batch of 3 rows")


def test_keras_own_batch_size(log: Any) -> None:
    fit(pk.DataParallelModel(mlp(), 8), 33)
    assert warned(log) == []
    fit(pk.DataParallelModel(mlp(), 8), 31)
    assert warned(log)[0].startswith("A batch of 31 rows")


def normalised(synchronized: bool, trainable: bool = True) -> keras.Model:
    layer = keras.layers.BatchNormalization(
        synchronized=synchronized, trainable=trainable, name="norm"
    )
    return keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3)])


def test_normalising_few_rows(log: Any) -> None:
    """N5, https://github.com/tensorflow/tensorflow/issues/7439."""
    fit(pk.DataParallelModel(normalised(synchronized=False), 2), 30, batch_size=15)
    [_, message] = warned(log)  # the first is about exceptions, whatever the rows
    assert message.startswith("Layer 'norm' normalises the rows of each device by themselves")
    assert "gives each of 2 devices fewer than 8" in message
    assert "synchronized=True" in message


@pytest.mark.parametrize(
    ("arguments", "batch"), [((False,), 16), ((True,), 15), ((False, False), 15)]
)
def test_normalising_enough_rows(log: Any, arguments: Any, batch: int) -> None:
    fit(pk.DataParallelModel(normalised(*arguments), 2), batch, batch_size=batch)
    assert not any("fewer than" in message for message in warned(log))
    by_shard = [message for message in warned(log) if "by themselves" in message]
    assert len(by_shard) == (arguments == (False,))


CARDS = [Card(0, "NVIDIA T4", 15360), Card(1, "NVIDIA A100", 40960)]


def gpus(monkeypatch: pytest.MonkeyPatch, models: list[str]) -> None:
    """As if there were GPUs, of which only names are needed."""
    details = [{"device_name": model} for model in models]
    monkeypatch.setattr(hardware, "driver_cards", lambda: CARDS)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: range(len(models)))
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda device: details[device]
    )


def test_unequal_memory(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, ["NVIDIA A100", "NVIDIA T4"])
    parallel = pk.DataParallelModel(mlp(), 2)
    said = notices.Notices(mlp(), ["/device:GPU:0", "/device:GPU:1"])
    said.wrapped(parallel)
    said.wrapped(parallel)
    [message] = warned(log)
    assert "(/device:GPU:0: 40,960 MB, /device:GPU:1: 15,360 MB)" in message
    assert "devices=[...]" in message


@pytest.mark.parametrize("models", [["NVIDIA T4", "NVIDIA T4"], ["NVIDIA T4", "unknown"]])
def test_equal_or_unknown_memory(
    log: Any, monkeypatch: pytest.MonkeyPatch, models: list[str]
) -> None:
    gpus(monkeypatch, models)
    notices.Notices(mlp(), ["/device:GPU:0", "/device:GPU:1"]).wrapped(
        pk.DataParallelModel(mlp(), 2)
    )
    assert warned(log) == []


def test_exceptions_are_said_once(log: Any) -> None:
    layers = [keras.layers.BatchNormalization(name="norm"), keras.layers.Dropout(0.5, name="drop")]
    template = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])
    parallel = pk.DataParallelModel(template, 2)
    parallel.compile("sgd", "mse")
    for _ in range(2):
        parallel.fit(np.ones((32, 3)), np.ones((32, 1)), verbose=0)
    (message,) = warned(log)
    assert "layer 'drop' draws other random numbers on each device" in message
    assert "layer 'norm' normalises the rows of each device by themselves" in message
