"""How each framework trains a workload on one device or two, as its own guide has it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from typing import Any

import keras
import numpy as np

from benchmarks.frameworks.runner import Train
from benchmarks.workloads import WORKLOADS


class Batches(keras.utils.PyDataset):
    """The same batch so many times: all frameworks are fed by this.

    Args:
        x: Inputs of the batch.
        y: Targets.
        steps: How many times.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, steps: int) -> None:
        super().__init__()
        self._batch, self._steps = (x, y), steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._batch


class Ends(keras.callbacks.Callback):
    """Takes the time when the loss of a step can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        float(logs["loss"])
        self.times.append(time.perf_counter())


def by_fit(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Train:
    """Training by `fit`."""

    def train(steps: int) -> list[float]:
        ends = Ends()
        model.fit(Batches(x, y, steps), shuffle=False, verbose=0, callbacks=[ends])
        return ends.times

    return train


def tensorflow(spec: dict[str, Any]) -> Train:
    """Keras on TensorFlow: the model itself, in a wrapper of ours, or under MirroredStrategy."""
    import tensorflow as tf

    from benchmarks.peers import PEERS
    from parallel_keras.measuring.runner import prepare

    tf.get_logger().setLevel("ERROR")
    workload = WORKLOADS[spec["workload"]]
    devices = prepare(spec["devices"])
    return by_fit(PEERS[spec["way"]](workload.compiled, devices), *workload.data())


def jax(spec: dict[str, Any]) -> Train:
    """Keras on JAX, on two devices by `keras.distribution.DataParallel`."""
    if spec["devices"] > 1:
        devices = keras.distribution.list_devices()
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    workload = WORKLOADS[spec["workload"]]
    # Without XLA, JAX runs operation by operation, which nobody does.
    return by_fit(workload.compiled(jit_compile=True), *workload.data())


def torch(spec: dict[str, Any]) -> Train:
    """Keras on PyTorch in a loop of its own, on two devices with DistributedDataParallel.

    The first process starts the others, and tells them what it is told.
    """
    from torch import distributed, get_num_threads, nn, set_num_threads

    set_num_threads(1)
    assert get_num_threads() == 1
    rank, devices = spec.get("rank", 0), spec["devices"]
    workload = WORKLOADS[spec["workload"]]
    x, y = workload.data()
    model = workload.compiled()
    others = []
    if devices > 1:
        module: Any
        if rank == 0:
            store = distributed.TCPStore(
                "127.0.0.1", 0, devices, is_master=True, wait_for_workers=False
            )
            others = [_start({**spec, "rank": r, "port": store.port}) for r in range(1, devices)]
        else:
            store = distributed.TCPStore("127.0.0.1", spec["port"], devices)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=devices)
        module = nn.parallel.DistributedDataParallel(model)
    else:
        module = model
    train = by_loop(module, model, workload.loss, x[rank::devices], y[rank::devices])

    def train_all(steps: int) -> list[float]:
        for other in others:
            print(f"train {steps}", file=other.stdin, flush=True)
        return train(steps)

    return train_all


def by_loop(module: Any, model: keras.Model, loss: Any, x: np.ndarray, y: np.ndarray) -> Train:
    """Training as Keras' guide to PyTorch on several devices has it."""
    from torch import from_numpy, optim

    kinds = {"sgd": optim.SGD, "adam": optim.Adam, "rmsprop": optim.RMSprop}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    make = kinds[type(model.optimizer).__name__.lower()]
    optimizer = make(weights, lr=float(model.optimizer.learning_rate))
    measure = keras.losses.get(loss)

    def train(steps: int) -> list[float]:
        batches, ends = Batches(x, y, steps), []
        for index in range(steps):
            inputs, targets = map(from_numpy, batches[index])
            optimizer.zero_grad()
            value = measure(targets, module(inputs, training=True))
            value.backward()
            optimizer.step()
            float(value)
            ends.append(time.perf_counter())
        return ends

    return train


def _start(spec: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.frameworks.trainers", json.dumps(spec)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def follow() -> None:
    """Another process of PyTorch: does what the first one tells it, until that one ends."""
    train = TRAINERS["torch"](json.loads(sys.argv[1]))
    for line in sys.stdin:
        with contextlib.suppress(BrokenPipeError):
            train(int(line.split()[1]))


TRAINERS = {"tensorflow": tensorflow, "jax": jax, "torch": torch}

if __name__ == "__main__":
    follow()
