"""What runs in the namespaces: servers, the script that uses them, and workers.

Each function is told a spec, and returns the commands that it answers. `train` runs so many steps
and returns the seconds of each but the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from benchmarks.links.models import MODELS
from parallel_keras.measuring.clock import differences
from parallel_keras.measuring.runner import Contender, prepare
from parallel_keras.workers import cluster

Commands = dict[str, Callable[[int], Any]]
PORT = 2222
RATE = 1e-4  # of the optimizer


def server(spec: dict[str, Any]) -> Commands:
    """A device: a TensorFlow server. Told the addresses of all servers and of the script."""
    _few_threads()
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1)
    held = tf.distribute.Server(
        _cluster(spec), job_name="worker", task_index=spec["index"], config=config
    )
    return {"address": lambda _: held.target}


def script(spec: dict[str, Any]) -> Commands:
    """The script whose towers are on the servers, with its weights where the spec says."""
    _few_threads()
    tf.config.experimental_connect_to_cluster(_cluster(spec), job_name="client", task_index=0)
    towers = spec["devices"]
    devices = [f"/job:worker/replica:0/task:{index}/device:CPU:0" for index in range(towers)]
    model, x, y = _subject(spec, towers)
    parallel = pk.DataParallelModel(model, devices, weights_on=spec["weights_on"])
    return _training(Contender(parallel, x, y), model)


def local(spec: dict[str, Any]) -> Commands:
    """As many devices in one process: what a step takes where nothing goes over a link."""
    towers = spec["devices"]
    devices = prepare(towers)
    model, x, y = _subject(spec, towers)
    parallel = pk.DataParallelModel(model, devices, weights_on="unmoved")
    return _training(Contender(parallel, x, y), model)


def worker(spec: dict[str, Any]) -> Commands:
    """One of the workers of a `strategy=`: its tower, and one sum a step with the others."""
    strategy = _strategy(spec)
    model, x, y = _subject(spec, spec["devices"])
    parallel = pk.DataParallelModel(model, ["CPU:0"], strategy=strategy)
    # What a worker sends is 2 (N - 1) / N of the vector that all of them add up.
    share = 2 * (spec["devices"] - 1) / spec["devices"]
    commands = _training(Contender(parallel, x, y), model)
    held = {"vector": lambda _: (parallel.bytes_per_step or 0) / share}
    return {**commands, **held}


def ring(spec: dict[str, Any]) -> Commands:
    """One of the replicas of TensorFlow's own data parallelism: a ring all-reduce of gradients."""
    strategy, replicas = _strategy(spec), spec["devices"]
    model, x, y = _subject(spec, replicas)
    rows = slice(spec["index"], None, replicas)
    loop = RingLoop(strategy, model, x[rows], y[rows])
    return {"train": loop.train, "weights": lambda _: _weights(model)}


class RingLoop:
    """A training loop as TensorFlow's guide for several workers has it.

    Keras' `fit` does not run under this strategy, so the weights are plain variables, equal on all
    workers, as the gradients that are added to them are.

    Args:
        strategy: The `MultiWorkerMirroredStrategy`.
        model: The model, built with the same weights on each worker.
        x: The rows of this worker.
        y: Their targets.
    """

    def __init__(self, strategy: Any, model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
        self._strategy, self._model = strategy, model
        self._x, self._y = tf.constant(x), tf.constant(y)
        self._step = tf.function(lambda: strategy.run(self._on_replica), autograph=False)

    def train(self, steps: int) -> list[float]:
        """Seconds of each step, without the first."""
        ends = []
        for _ in range(steps + 1):
            float(self._step())
            ends.append(time.perf_counter())
        return differences(ends)

    def _on_replica(self) -> tf.Tensor:
        variables = [variable.value for variable in self._model.trainable_weights]
        with tf.GradientTape() as tape:
            loss = self._model.compute_loss(
                self._x, self._y, self._model(self._x, training=True), training=True
            )
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]
        context = tf.distribute.get_replica_context()
        total = context.all_reduce(tf.distribute.ReduceOp.MEAN, gradients)
        for variable, gradient in zip(variables, total, strict=True):
            variable.assign_sub(RATE * gradient)
        return loss


def _few_threads() -> None:
    # Each device has one, as a GPU that is added brings cores of its own.
    tf.config.threading.set_intra_op_parallelism_threads(1)


def _cluster(spec: dict[str, Any]) -> tf.train.ClusterSpec:
    servers = [f"{address}:{PORT}" for address in spec["addresses"]]
    return tf.train.ClusterSpec({"worker": servers, "client": [f"{spec['script']}:{PORT}"]})


def _strategy(spec: dict[str, Any]) -> tf.distribute.MultiWorkerMirroredStrategy:
    _few_threads()
    servers = [f"{address}:{PORT}" for address in spec["addresses"]]
    os.environ["TF_CONFIG"] = cluster.write(servers, spec["index"])
    return tf.distribute.MultiWorkerMirroredStrategy()


def _subject(spec: dict[str, Any], towers: int) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    return MODELS[spec["model"]].subject(towers, RATE)


def _training(contender: Contender, model: keras.Model) -> Commands:
    return {"train": contender.train, "weights": lambda _: _weights(model)}


def _weights(model: keras.Model) -> dict[str, int]:
    weights = model.trainable_weights
    sizes = [int(np.prod(w.shape)) * tf.as_dtype(w.dtype).size for w in weights]
    return {"weights": sum(sizes), "tensors": len(sizes)}
