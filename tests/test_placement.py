"""Where things run: proven from the traced graph, with pretended GPUs, and by towers that wait."""

import collections
import threading
from typing import Any

import keras
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.towers import collectives
from tests.parity import Waits, rows

Device = collections.namedtuple("Device", ["name", "device_type"])
GPUS = [f"/device:GPU:{index}" for index in range(8)]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one CPU and eight GPUs, as far as a graph can tell."""
    machine = [Device("/device:CPU:0", "CPU"), *(Device(name, "GPU") for name in GPUS)]

    def list_logical_devices(device_type: str | None = None) -> list[Device]:
        return [device for device in machine if device_type in (None, device.device_type)]

    monkeypatch.setattr(tf.config, "list_logical_devices", list_logical_devices)


def convnet() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def traced(parallel: pk.DataParallelModel, step: str) -> tf.Graph:
    data = (tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None, 3)))
    function = tf.function(getattr(parallel, step), autograph=False)
    return function.get_concrete_function(data).graph


def calls(graph: tf.Graph) -> dict[str, list[tf.Operation]]:
    """The calls of the tower functions, by device."""
    found = collections.defaultdict(list)
    for op in graph.get_operations():
        if "PartitionedCall" in op.type:
            found[op.device].append(op)
    return dict(found)


@pytest.mark.sweep(4)
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("merge_device", ["/CPU:0", "/gpu:3"])
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("step", ["train_step", "test_step", "predict_step"])
def test_each_tower_on_its_gpu(step: str, loss_on: str, merge_device: str) -> None:
    """S5, P2: https://github.com/tensorflow/tensorflow/issues/56676."""
    parallel = pk.DataParallelModel(convnet(), loss_on=loss_on, merge_device=merge_device)
    assert parallel.devices == tuple(GPUS)
    parallel.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    graph = traced(parallel, step)
    by_device = calls(graph)
    assert set(by_device) == set(GPUS)
    backward = step == "train_step" and loss_on == "merged"
    assert {len(ops) for ops in by_device.values()} == {2 if backward else 1}
    for device, ops in by_device.items():
        # Weights are copied to the device first, each once: no tower reads them from afar.
        # Small ones arrive as one vector, which is cut and brought into shape there.
        kinds = {"Identity", "IdentityN", "Reshape"}
        copies = {value.name for op in ops for value in op.inputs if value.op.type in kinds}
        own = {v.name for op in graph.get_operations() if op.device == device for v in op.outputs}
        assert len(copies & own) >= len(parallel.template.variables)
        assert not [value for op in ops for value in op.inputs if value.op.type == "ReadVariableOp"]
    merge = parallel.merge_device
    heavy = {"Conv2D", "Conv2DBackpropFilter", "MatMul", "FusedBatchNormV3"}
    for op in graph.get_operations():
        assert op.device in {"", merge, "/device:CPU:0", *GPUS}
        assert op.type not in heavy  # they are all inside of the towers
        if op.type in {"StridedSliceGrad", "MulNoNan"}:
            assert op.device == merge, op
        if op.type == "AddN" and op.outputs[0].shape.rank == 0:
            assert op.device == merge, op
        if op.type in {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}:
            assert op.inputs[0].op.type == "Placeholder", op  # on the device of its variable
    # What is inside of a tower runs where the tower is called.
    bodies = graph.as_graph_def().library.function
    assert heavy & {node.op for body in bodies for node in body.node_def}
    assert {node.device for body in bodies for node in body.node_def} <= {""}


@pytest.mark.usefixtures("eight_gpus")
def test_loss_and_metrics_on_the_merge_device() -> None:
    parallel = pk.DataParallelModel(convnet(), loss_on="merged", merge_device="GPU:2")
    parallel.compile("sgd", "mse")
    graph = traced(parallel, "train_step")
    loss = [op for op in graph.get_operations() if op.name.startswith("compile_loss")]
    assert loss
    assert {op.device for op in loss} == {"/device:GPU:2"}


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("devices", [["GPU:1"], [1, 3], ["/gpu:5", "/GPU:0"]])
def test_no_other_gpu_is_touched(devices: list[Any]) -> None:
    """C7, M2: https://github.com/tensorflow/tensorflow/issues/31410."""
    parallel = pk.DataParallelModel(convnet(), devices)
    parallel.compile("sgd", "mse")
    used = {op.device for op in traced(parallel, "train_step").get_operations()}
    assert used - {"", "/device:CPU:0"} == set(parallel.devices)


@pytest.mark.usefixtures("eight_gpus")
def test_no_nccl() -> None:
    """F2: https://github.com/tensorflow/tensorflow/issues/21470."""
    parallel = pk.DataParallelModel(convnet())
    parallel.compile("sgd", "mse")
    graph = traced(parallel, "train_step").as_graph_def()
    ops = {node.op for node in graph.node}
    ops |= {node.op for body in graph.library.function for node in body.node_def}
    assert not [op for op in ops if "Nccl" in op or "Collective" in op]


@pytest.mark.usefixtures("eight_gpus")
def test_large_outputs_stay_on_their_tower() -> None:
    """M1: https://github.com/pytorch/pytorch/issues/1893."""
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(999)]
    )
    spec = (tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None,), tf.int32))
    widths = {}
    for loss_on in ("auto", "merged"):
        parallel = pk.DataParallelModel(model, loss_on=loss_on)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        parallel.compile("sgd", loss, metrics=["accuracy"])
        graph = tf.function(parallel.train_step).get_concrete_function(spec).graph
        merging = [
            op
            for op in graph.get_operations()
            if op.type == "ConcatV2" and (op.outputs[0].shape.rank or 0) > 1
        ]
        widths[loss_on] = {op.outputs[0].shape[-1] for op in merging}
    assert widths == {"auto": set(), "merged": {999}}


def test_towers_are_traced_once() -> None:
    """P3: time to first step hardly grows with the number of towers."""
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            traces.append(x.shape)
            return x

    for loss_on in ("merged", "towers"):
        model = keras.Sequential([keras.Input((6,)), Traced(), keras.layers.Dense(3)])
        parallel = pk.DataParallelModel(model, 8, loss_on=loss_on)
        parallel.compile("sgd", "mse")
        traces.clear()
        parallel.fit(rows(33, 6), rows(33, 3), batch_size=16, epochs=3, verbose=0)
        # Once for all towers, and once symbolically, to build losses and metrics beforehand.
        assert len(traces) == 2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_the_step_is_traced_once_for_each_kind_of_batch(
    loss_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3, without a trace that is thrown away because it made variables, as Keras' first is."""
    traces = []
    original = pk.DataParallelModel.train_step

    def counting(self: Any, data: Any) -> Any:
        traces.append(data)
        return original(self, data)

    monkeypatch.setattr(pk.DataParallelModel, "train_step", counting)
    x, y = rows(33, 6), rows(33, 3)

    def compiled() -> pk.DataParallelModel:
        monkeypatch.setattr(collectives, "_TOKENS", {})  # as in the first step of a process
        traces.clear()
        template = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        parallel = pk.DataParallelModel(template, 8, loss_on=loss_on)
        parallel.compile("adam", "mse", metrics=["mae"])
        return parallel

    known = tf.data.Dataset.from_tensor_slices((x, y)).batch(16, drop_remainder=True)
    # A full batch of known size, and one of unknown size that serves as the tail too.
    for data in ({"x": known}, {"x": x, "y": y, "batch_size": 16}):
        compiled().fit(**data, epochs=2, verbose=0, shuffle=False)
        assert len(traces) == 1
    compiled().train_on_batch(x, y)
    assert len(traces) == 1


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_towers_overlap_in_time(loss_on: str, stateful: bool) -> None:
    """Each tower waits for the other: one after the other, they would wait for ever."""
    barrier = threading.Barrier(2, timeout=60)

    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3), Waits(barrier, stateful=stateful)]
    )
    parallel = pk.DataParallelModel(model, 2, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    parallel.fit(rows(8, 6), rows(8, 3), batch_size=4, verbose=0)
    parallel.predict(rows(8, 6), batch_size=4, verbose=0)
    parallel(rows(8, 6))
    assert not barrier.broken


def is_constant(tensor: tf.Tensor) -> bool:
    """Whether TensorFlow can compute a tensor while it optimises the graph."""
    if tensor.op.type == "Const":
        return True
    inputs = tensor.op.inputs
    hidden = tensor.op.type == "PlaceholderWithDefault"
    return bool(inputs) and not hidden and all(map(is_constant, inputs))


def test_towers_are_not_copied_for_constants() -> None:
    """P3: a call with a constant argument has TensorFlow copy and optimise the whole tower."""
    parallel = pk.DataParallelModel(convnet(), 8)
    parallel.compile("sgd", "mse")
    data = (tf.TensorSpec((16, 8, 8, 1)), tf.TensorSpec((16, 3)))  # all sizes are known
    step = tf.function(parallel.train_step, autograph=False)
    by_device = calls(step.get_concrete_function(data).graph)
    assert len(by_device) == 8
    for ops in by_device.values():
        assert not [v.name for op in ops for v in op.inputs if is_constant(v)]
