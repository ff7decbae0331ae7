"""What goes from device to device in a step: from its graph, and from what TensorFlow ran.

Traced with pretended GPUs, as in test_placement.py; run on logical CPUs that are taken for devices
behind links, as in test_weights_on.py.
"""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.explaining.traffic import Traffic, crossings, traffic
from parallel_keras.homes import links, messages
from tests.parity import rows
from tests.test_placement import GPUS, eight_gpus  # noqa: F401 (a fixture)

L, O = keras.layers, keras.optimizers  # noqa: E741
MERGE = "/device:CPU:0"
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adam": lambda: O.Adam(0.01),
    "clipnorm": lambda: O.SGD(0.01, clipnorm=0.1),
    "clipvalue": lambda: O.SGD(0.01, clipvalue=0.1),
    "global clipnorm": lambda: O.AdamW(0.01, global_clipnorm=0.1),
    "average": lambda: O.SGD(0.01, use_ema=True),
    "scaled": lambda: O.Adam(0.01, loss_scale_factor=8.0),
    "nadam": lambda: O.Nadam(0.01),
}
# Their updates are in the branch of a condition, which the traced graph does not show.
CONDITIONAL: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "loss scale": lambda: O.LossScaleOptimizer(O.Adam(0.01, global_clipnorm=0.1)),
    "accumulated": lambda: O.Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.1),
    "overwritten": lambda: O.SGD(0.01, use_ema=True, ema_overwrite_frequency=2),
}


def deep(layers: int) -> keras.Model:
    """Each kernel has a shape of its own."""
    hidden = [
        L.Dense(20 + index, kernel_regularizer="l2", kernel_constraint="non_neg")
        for index in range(layers)
    ]
    return keras.Sequential([keras.Input((9,)), *hidden, L.BatchNormalization(), L.Dense(3)])


def traced(
    optimizer: Any, loss_on: str, layers: int = 12, **arguments: Any
) -> tuple[pk.DataParallelModel, Any]:
    parallel = pk.DataParallelModel(deep(layers), loss_on=loss_on, **arguments)
    parallel.compile(optimizer, "mse")
    parallel.optimizer.build(parallel.trainable_variables)
    parallel.make_train_function()  # slots go beside their weights
    data = (tf.TensorSpec((24, 9)), tf.TensorSpec((24, 3)))
    step = tf.function(parallel.train_step, autograph=False)
    return parallel, step.get_concrete_function(data).graph


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_gradients_travel_between_their_home_and_the_towers_only(
    name: str, loss_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "LARGE", 0)  # nothing is packed, so each is known by its shape
    parallel, graph = traced(OPTIMIZERS[name](), loss_on)
    homes = {
        tuple(weight.shape): parallel.homes.of(weight)
        for weight in parallel.trainable_weights
        if len(weight.shape) == 2
    }
    assert set(homes.values()) == set(GPUS)
    found = collections.Counter()
    for source, target, tensor in crossings(graph, parallel.homes.handles(), GPUS[0]):
        shape = tuple(tensor.shape)
        if shape in homes:
            assert homes[shape] in (source, target), tensor
            assert {source, target} <= set(GPUS), tensor
            found[shape, source == homes[shape]] += 1
    # Out to seven towers, and back from as many.
    assert found == {(shape, out): 7 for shape in homes for out in (True, False)}


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("weights_on", ["unmoved", "gpu:3", "/CPU:0"])
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_weights_in_one_place_are_summed_and_updated_there(weights_on: str, loss_on: str) -> None:
    optimizer = OPTIMIZERS["global clipnorm"]()
    parallel, graph = traced(optimizer, loss_on, weights_on=weights_on)
    home = {"unmoved": MERGE, "gpu:3": GPUS[3], "/CPU:0": MERGE}[weights_on]
    shapes = {tuple(weight.shape) for weight in parallel.trainable_weights if len(weight.shape) > 1}
    for source, target, tensor in crossings(graph, parallel.homes.handles(), GPUS[0]):
        if tuple(tensor.shape) in shapes:
            assert home in (source, target), tensor


@pytest.mark.sweep(1)
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_messages_do_not_grow_with_the_number_of_small_weights(name: str, loss_on: str) -> None:
    counts = []
    for layers in (9, 18):
        parallel, graph = traced(OPTIMIZERS[name](), loss_on, layers)
        counted = traffic(graph, parallel.homes.handles(), GPUS[0])
        counts.append({device: counted.messages_into(device) for device in counted.devices})
    few, many = counts
    for device in few:
        # The norm of each weight is a number of its own; all go to where they are added up. What an
        # average counts with is computed anew for each weight: once, when TensorFlow runs it. And
        # to a loss of merged outputs Keras adds the regulariser of each kernel by itself.
        numbers = len(parallel.trainable_weights) if name in ("global clipnorm", "average") else 0
        numbers += 9 if loss_on == "merged" and device == MERGE else 0
        assert many[device] <= few[device] + 3 + numbers, counts
    assert max(few.values()) < 40, counts


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditions_fetch_no_weights(
    name: str, loss_on: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted in the graphs that TensorFlow ran, one for each device."""
    monkeypatch.setattr(links, "is_gpu", lambda device: bool(device))
    counts = []
    for layers in (6, 12):
        parallel = pk.DataParallelModel(
            deep(layers), ["CPU:1", "CPU:2", "CPU:3"], loss_on=loss_on, weights_on="spread"
        )
        parallel.compile(CONDITIONAL[name](), "mse")
        parallel.optimizer.build(parallel.trainable_variables)
        parallel.make_train_function()
        step = tf.function(parallel.train_step, autograph=False)
        data = (tf.constant(rows(8, 9)), tf.constant(rows(8, 3)))
        counts.append(received(step, data, tmp_path / str(layers)))
    # To a loss of merged outputs Keras adds the regulariser of each kernel by itself.
    few, many = (each.pop("CPU:0") for each in counts)
    assert many <= few + 4 + (6 if loss_on == "merged" else 0)
    usual = min(counts[0].values())
    *others, most = sorted(counts[1].values())
    assert max(others) <= usual + 4, counts
    # Norms are numbers, gathered in one place; whether gradients are finite each device tells once.
    norms = len(parallel.trainable_weights) if name == "loss scale" else 0
    assert most <= usual + 4 + norms, counts


def received(step: Any, data: Any, folder: Path) -> dict[str, int]:
    """How many tensors each device got from others, by the graphs that TensorFlow ran.

    TensorFlow tells what it runs when it first does. What ran before stays among it once a process
    has asked, so only the last graph of all devices, which is that of this step, is counted.
    """
    writer = tf.summary.create_file_writer(str(folder))
    tf.summary.trace_on(graph=True)
    step(data)
    with writer.as_default():
        tf.summary.trace_export("step", step=0)
    writer.close()
    found: collections.Counter[str] = collections.Counter()
    (file,) = folder.iterdir()
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            ran = tf.compat.v1.RunMetadata.FromString(value.tensor.string_val[0])
            for function in ran.function_graphs:
                nodes = [node for graph in function.partition_graphs for node in graph.node]
                found = _received(nodes) or found
    assert found
    return dict(found)


def _received(nodes: list[Any]) -> collections.Counter[str]:
    return collections.Counter(
        node.attr["recv_device"].s.decode()[-5:]
        for node in nodes
        if node.op in ("_Recv", "_HostRecv")
    )


def test_a_tensor_counts_once_for_each_device_that_it_goes_to() -> None:
    variable = tf.Variable([1.0, 2.0])

    def step(x: tf.Tensor) -> list[tf.Tensor]:
        results = []
        for device in ("/device:CPU:1", "/device:CPU:1", "/device:CPU:2"):
            with tf.device(device):
                results.append(x + variable)
        with tf.device("/device:CPU:1"):
            results.append(results[2] * 2.0)
        return results

    graph = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([2])).graph
    counted = traffic(graph)
    # Each reading of the variable is a tensor of its own.
    assert counted.messages == {
        (MERGE, "/device:CPU:1"): 3,
        (MERGE, "/device:CPU:2"): 2,
        ("/device:CPU:2", "/device:CPU:1"): 1,
    }
    assert counted.bytes_into("/device:CPU:1") == 4 * 8
    assert counted.bytes_out_of(MERGE) == 5 * 8
    assert counted.busiest == (MERGE, 40)
    moved = traffic(graph, {id(variable.handle): "/device:CPU:1"})
    assert moved.messages[MERGE, "/device:CPU:1"] == 1
    assert Traffic({}, {}).busiest == ("", 0)
