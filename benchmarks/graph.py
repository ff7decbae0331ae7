"""What the traced graph of a training step says: bytes over the merge device, and traces of a fit.

Run as `python -m benchmarks.graph`; prints JSON.
"""

from __future__ import annotations

import collections
import json
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from benchmarks.workloads import next_word
from parallel_keras.explaining.traffic import traffic
from parallel_keras.homes import links
from parallel_keras.homes.plan import size_of
from parallel_keras.measuring.runner import prepare

ROWS, TOWERS, SPREAD_OVER = 16, 2, 8
MERGE, DEVICES = "/device:CPU:0", ["/device:CPU:1", "/device:CPU:2"]
# Outputs grow with both numbers, weights with the second only.
SIZES = ((16, 8192), (32, 8192), (64, 8192), (64, 1024), (64, 2048), (64, 4096))


def crossing_bytes(graph: tf.Graph, merge_device: str) -> int:
    """Bytes of the tensors that go to the merge device, or from it to another one.

    A tensor counts once for each device that it goes to. What has no device runs where TensorFlow
    likes, and is taken to be on the merge device.
    """
    crossing = set()
    for operation in graph.get_operations():
        reader = operation.device or merge_device
        for tensor in operation.inputs:
            writer = tensor.op.device or merge_device
            if writer != reader and merge_device in (writer, reader):
                crossing.add((tensor.ref(), reader))
    return sum(_bytes(tensor.deref()) for tensor, _ in crossing)


def _bytes(tensor: tf.Tensor) -> int:
    # A handle is the place of a variable, not its value.
    return (
        0
        if tensor.dtype in (tf.resource, tf.variant)
        else tensor.shape.num_elements() * (tensor.dtype.size)
    )


def large_outputs(tokens: int, words: int, loss_on: str) -> dict[str, int]:
    """Bytes of weights, batch and outputs, and of what crosses, of one training step."""
    model = next_word(tokens, words)
    parallel = pk.DataParallelModel(model, DEVICES, merge_device=MERGE, loss_on=loss_on)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    parallel.compile(keras.optimizers.SGD(0.01), loss)
    spec = tf.TensorSpec((ROWS, tokens), "int32")
    step = tf.function(parallel.train_step, autograph=False)
    graph = step.get_concrete_function((spec, spec)).graph
    return {
        "tokens": tokens,
        "words": words,
        "weights": 4 * model.count_params(),
        "batch": 2 * 4 * ROWS * tokens,
        "outputs": 4 * ROWS * tokens * words,
        "crossing": crossing_bytes(graph, MERGE),
    }


def _for_real() -> bool:
    """Whether the graph that is being made will be run.

    Keras runs a train step once more, in a graph of this name that it throws away.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if getattr(graph, "name", "").startswith("scratch_graph"):
            return False
        graph = getattr(graph, "outer_graph", None)
    return True


class Counting(keras.layers.Layer):
    """Counts how often Python runs it for a function that will be run."""

    traces = 0

    def call(self, x: Any) -> Any:
        self.traces += _for_real()
        return x


class CountingModel(pk.DataParallelModel):
    """Counts how often Python runs its train step, likewise."""

    traces = 0

    def train_step(self, data: Any) -> Any:
        self.traces += _for_real()
        return super().train_step(data)


def traces() -> dict[str, int]:
    """Traces in one `fit` whose last batch is smaller: of the train step, and of the template."""
    counting = Counting()
    model = keras.Sequential([keras.Input((4,)), counting, keras.layers.Dense(2)])
    parallel = CountingModel(model, DEVICES)
    parallel.compile("sgd", "mse", metrics=["mae"])
    counting.traces = 0
    parallel.fit(np.ones((50, 4)), np.ones((50, 2)), batch_size=16, epochs=3, verbose=0)
    return {"step": parallel.traces, "template": counting.traces}


def spread() -> dict[str, Any]:
    """Xception with its weights spread over devices that are taken to be behind links.

    Returns:
        The tensors into the device that gets most in a step, and the bytes that Adam keeps on each.
    """
    devices = [f"/device:CPU:{1 + tower}" for tower in range(SPREAD_OVER)]
    model = keras.applications.Xception(weights=None, input_shape=(71, 71, 3), classes=10)
    with mock.patch.object(links, "is_gpu", bool):
        parallel = pk.DataParallelModel(model, devices, merge_device=MERGE, weights_on="spread")
        parallel.compile("adam", "sparse_categorical_crossentropy")
        parallel.optimizer.build(parallel.trainable_variables)
        parallel.make_train_function()  # slots go beside their weights
        specs = tf.TensorSpec((SPREAD_OVER, 71, 71, 3)), tf.TensorSpec((SPREAD_OVER,), "int32")
        step = tf.function(parallel.train_step, autograph=False)
        graph = step.get_concrete_function(specs).graph
    found = traffic(graph, parallel.homes.handles(), MERGE)
    state = collections.Counter()
    for variable in parallel.optimizer.variables:
        state[parallel.homes.of(variable)] += size_of(variable)
    return {
        "messages": max(map(found.messages_into, found.devices)),
        "state": [state[device] for device in devices],
    }


def main() -> None:
    """Prints everything."""
    prepare(SPREAD_OVER + 1)
    bytes_ = {
        loss_on: [large_outputs(*size, loss_on) for size in SIZES] for loss_on in ("auto", "merged")
    }
    counted = {"traces": traces(), "spread": spread()}
    print(json.dumps({"towers": TOWERS, "bytes": bytes_, **counted}))


if __name__ == "__main__":
    main()
