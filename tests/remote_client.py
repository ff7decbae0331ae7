"""What `test_remote.py` runs: a script whose towers are on servers in other processes.

A process of its own, because connecting changes the devices of the whole process. It writes one
line of JSON for each case. Arguments: the addresses of the servers, then their process numbers.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from tests.parity import assert_same_fit, assert_same_variables, batches, mlp, pair, rows

REMOTE = ["/job:worker/task:0/device:CPU:0", "/job:worker/task:1/device:CPU:0"]
X, Y = rows(12, 6), rows(12, 3, seed=1)


def normalised(*, synchronized: bool) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh"),
            layers.BatchNormalization(synchronized=synchronized),
            layers.Dense(3),
        ]
    )


def data() -> tf.data.Dataset:
    return batches([5, 4, 1, 2], X, Y)  # uneven, and once fewer rows than towers


def assert_equal(one: keras.Model, other: pk.DataParallelModel) -> None:
    """Equal numbers of fit, evaluate, predict and a call."""
    assert_same_fit(one, other, data(), epochs=2)
    for method in ("evaluate", "predict"):
        numbers = [getattr(model, method)(data(), verbose=0) for model in (one, other)]
        np.testing.assert_allclose(*numbers, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(one(X[:7]), other(X[:7]), rtol=1e-5, atol=2e-6)


def equals_one_device(build: Callable[[], keras.Model], devices: Any, loss_on: str) -> None:
    arguments = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"]}
    assert_equal(*pair(build, devices, loss_on=loss_on, **arguments))


def equals_local_towers() -> None:
    """By shard, BatchNormalization normalises as on the same number of local devices."""

    def towers(devices: list[str]) -> pk.DataParallelModel:
        keras.utils.set_random_seed(7)
        model = pk.DataParallelModel(normalised(synchronized=False), devices)
        model.compile(optimizer="adam", loss="mse")
        keras.utils.set_random_seed(11)
        model.fit(data(), epochs=2, verbose=0)
        return model

    assert_same_variables(towers(["CPU:0", "CPU:1"]).template, towers(REMOTE))


def jobs_cannot_be_mixed() -> str:
    parallel = pk.DataParallelModel(normalised(synchronized=True), ["CPU:0", REMOTE[1]])
    parallel.compile(optimizer="sgd", loss="mse")
    return failure(lambda: parallel.fit(data(), verbose=0))


def looks_words_up(loss_on: str) -> None:
    """The table is large enough to stay on this machine."""

    def build() -> keras.Model:
        layers = keras.layers
        inputs = keras.Input((6,))
        hidden = layers.Flatten()(layers.Embedding(8192, 32)(inputs))
        return keras.Model(inputs, layers.Dense(3)(hidden))

    made = {"optimizer": "sgd", "loss": "mse"}
    bare, parallel = pair(build, ["CPU:1", *REMOTE], loss_on=loss_on, **made)
    assert_same_fit(bare, parallel, batches([5, 4, 1, 2], X * 0 + np.arange(72).reshape(12, 6), Y))


def unknown_task() -> str:
    return failure(lambda: pk.DataParallelModel(mlp(), ["/job:worker/task:7/device:CPU:0"]))


def default_devices() -> list[str]:
    return list(pk.DataParallelModel(mlp()).devices)


def failure(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def a_server_dies(pid: int) -> dict[str, tuple[float, str]]:
    """How long each method takes to raise an error, and which; the first loses it in mid-epoch."""
    parallel = pk.DataParallelModel(mlp(), REMOTE)
    parallel.compile(optimizer="sgd", loss="mse")
    killed: list[float] = []

    def kill(batch: int, logs: Any = None) -> None:
        if batch == 2:
            os.kill(pid, signal.SIGKILL)
            killed.append(time.monotonic())

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=kill)
    found = {}
    found["fit"] = failure(lambda: parallel.fit(data(), verbose=0, callbacks=[callback]))
    times = {"fit": time.monotonic() - killed[0]}
    later = {"predict": lambda: parallel.predict(X, verbose=0), "call": lambda: parallel(X)}
    for name, function in later.items():
        start = time.monotonic()
        found[name] = failure(function)
        times[name] = time.monotonic() - start
    return {name: (times[name], found[name]) for name in found}


def main() -> None:
    addresses, pids = sys.argv[1:3], [int(pid) for pid in sys.argv[3:]]
    pk.virtual_devices(2)
    tf.config.threading.set_inter_op_parallelism_threads(4)
    tf.config.experimental_connect_to_host(addresses)
    cases: dict[str, Callable[[], Any]] = {
        "towers": lambda: equals_one_device(mlp, REMOTE, "towers"),
        "merged": lambda: equals_one_device(mlp, ["CPU:1", *REMOTE], "merged"),
        "normalised": equals_local_towers,
        "synchronized": lambda: equals_one_device(
            lambda: normalised(synchronized=True), REMOTE, "auto"
        ),
        "table, towers": lambda: looks_words_up("towers"),
        "table, merged": lambda: looks_words_up("merged"),
        "mixed": jobs_cannot_be_mixed,
        "unknown": unknown_task,
        "default": default_devices,
        "dies": lambda: a_server_dies(pids[1]),
    }
    for name, case in cases.items():
        start = time.monotonic()
        try:
            result = {"result": case()}
        except AssertionError as error:
            result = {"error": str(error)}
        print("RESULT", json.dumps({"name": name, "s": time.monotonic() - start, **result}))


if __name__ == "__main__":
    main()
