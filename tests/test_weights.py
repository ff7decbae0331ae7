"""Large embedding tables stay where they are; every other weight is copied to each device."""

import collections
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.graphs.graph import is_handle
from parallel_keras.homes.messages import Copies
from parallel_keras.homes.plan import Homes
from parallel_keras.towers import weights
from parallel_keras.towers.run import Towers
from parallel_keras.workers.alone import Alone
from tests.parity import ATOL, RTOL, Waits, assert_same_fit, pair, rng, rows

WORDS, WIDTH, TOKENS = 8192, 32, 5  # 1 MiB, so just large enough to stay
Optimizer = Callable[[], keras.optimizers.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda: keras.optimizers.SGD(0.5),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "clipped": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.1),
}


def ids(count: int, dtype: str = "int32", least: int = 0) -> np.ndarray:
    return rng(3).integers(least, WORDS, (count, TOKENS)).astype(dtype)


def head(x: Any) -> Any:
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.layers.Dense(2)(keras.layers.Dense(4, activation="tanh")(x))


def sentences(**options: Any) -> keras.Model:
    inputs = keras.Input((TOKENS,), dtype=options.pop("inputs", "int32"))
    return keras.Model(inputs, head(keras.layers.Embedding(WORDS, WIDTH, **options)(inputs)))


def twice() -> keras.Model:
    """One table, looked up in two places."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    embed = keras.layers.Embedding(WORDS, WIDTH)
    return keras.Model(inputs, head(embed(inputs) * embed(inputs[:, ::-1])))


class Tied(keras.Model):
    """Looks words up, and scores them by the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(WORDS, WIDTH)

    def call(self, x: Any) -> Any:
        hidden = keras.ops.mean(self.embed(x), axis=1)
        return keras.ops.matmul(hidden, keras.ops.transpose(self.embed.embeddings))


class Doubled(keras.layers.Embedding):
    def call(self, inputs: Any) -> Any:
        return 2 * super().call(inputs)


def subclassed() -> keras.Model:
    inputs = keras.Input((TOKENS,), dtype="int32")
    return keras.Model(inputs, head(Doubled(WORDS, WIDTH)(inputs)))


def normalised() -> keras.Model:
    """A layer that reads and assigns the table of another at each step."""
    inputs = keras.Input((TOKENS,), dtype="float32")  # Keras casts the outputs back to that
    embed = keras.layers.SpectralNormalization(keras.layers.Embedding(WORDS, WIDTH))
    return keras.Model(inputs, head(embed(inputs)))


class Maybe(keras.layers.Layer):
    """Reads the table of another layer as a whole, first in a branch of a condition."""

    def __init__(self, embed: keras.layers.Embedding) -> None:
        super().__init__()
        self.embed = embed

    def call(self, x: Any) -> Any:
        table = self.embed.embeddings

        def penalised() -> tf.Tensor:
            return x + tf.reduce_sum(tf.convert_to_tensor(table) ** 2)

        branch = tf.cond(tf.reduce_max(x) > -9.0, penalised, lambda: x)
        return branch + tf.reduce_mean(tf.convert_to_tensor(table))


def conditional() -> keras.Model:
    inputs = keras.Input((TOKENS,), dtype="int32")
    embed = keras.layers.Embedding(WORDS, WIDTH)
    return keras.Model(inputs, Maybe(embed)(head(embed(inputs))))


def graph_of(
    parallel: pk.DataParallelModel, step: str = "train_step", dtype: str = "int32"
) -> tf.Graph:
    data = (tf.TensorSpec((None, TOKENS), dtype), tf.TensorSpec((None, 2)))
    return tf.function(getattr(parallel, step), autograph=False).get_concrete_function(data).graph


def all_nodes(graph: tf.Graph) -> list[Any]:
    """The operations of a graph and of the functions that it calls, each function once."""
    definition = graph.as_graph_def()
    bodies = {body.signature.name: body.node_def for body in definition.library.function}
    found, waiting = list(definition.node), list(definition.node)
    while waiting:
        name = waiting.pop().attr["f"].func.name
        called = bodies.pop(name, ())
        found += called
        waiting += called
    return found


def reads(graph: tf.Graph, variable: keras.Variable) -> list[str]:
    """What reads a variable as a whole."""
    own = {
        placeholder.name
        for handle, placeholder in graph.captures
        if handle is variable.value.handle
    }
    return [
        op.name
        for op in graph.get_operations()
        if op.type == "ReadVariableOp" and op.inputs[0].name in own
    ]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
@pytest.mark.parametrize("towers", [1, 3, 8])
def test_same_numbers(optimizer: str, loss_on: str, towers: int) -> None:
    """P4: https://github.com/tensorflow/tensorflow/issues/53160."""
    loss_on = "merged" if towers == 1 else loss_on
    made = {"optimizer": OPTIMIZERS[optimizer], "loss": "mse"}
    bare, parallel = pair(sentences, towers, loss_on=loss_on, **made)
    # The last batch has fewer rows than the largest number of towers.
    assert_same_fit(bare, parallel, ids(23), rows(23, 2), batch_size=9, epochs=2)
    expected = bare.predict(ids(23), batch_size=9, verbose=0)
    found = parallel.predict(ids(23), batch_size=9, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
@pytest.mark.parametrize("build", [twice, subclassed, normalised, conditional])
def test_other_ways_to_read_a_table(build: Any, loss_on: str) -> None:
    made = {"optimizer": OPTIMIZERS["momentum"], "loss": "mse"}
    bare, parallel = pair(build, 3, loss_on=loss_on, **made)
    assert_same_fit(bare, parallel, ids(11), rows(11, 2), batch_size=7, epochs=2)


@pytest.mark.parametrize("loss_on", ["towers", "merged"])
def test_a_table_that_is_looked_up_and_read_as_a_whole(loss_on: str) -> None:
    """The gradient is that of both."""
    made = {"optimizer": OPTIMIZERS["momentum"], "loss": "mse"}
    bare, parallel = pair(Tied, 3, loss_on=loss_on, **made)
    assert_same_fit(bare, parallel, ids(11), rows(11, WORDS), batch_size=7, epochs=2)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("dtype", "least"), [("int32", -WORDS), ("int64", -WORDS), ("uint8", 0), ("float32", 0)]
)
def test_any_ids(dtype: str, least: int) -> None:
    """Negative ones count from the end, others than int32 and int64 are cast, as in Keras."""
    x = ids(11, "int32", least)
    x = (x % 256 if dtype == "uint8" else x).astype(dtype)
    made = {"optimizer": OPTIMIZERS["sgd"], "loss": "mse"}
    bare, parallel = pair(lambda: sentences(inputs=dtype), 3, **made)
    assert_same_fit(bare, parallel, x, rows(11, 2), batch_size=7, epochs=2)


def test_ids_out_of_range_are_an_error() -> None:
    parallel = pk.DataParallelModel(sentences(), 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="8192"):
        parallel.predict(np.full((4, TOKENS), WORDS), verbose=0)


@pytest.mark.parametrize("trainable", [True, False])
def test_mixed_precision_and_frozen_tables(trainable: bool) -> None:
    def build() -> keras.Model:
        model = sentences(dtype="mixed_bfloat16")
        model.layers[1].trainable = trainable
        return model

    made = {"optimizer": OPTIMIZERS["sgd"], "loss": "mse"}
    bare, parallel = pair(build, 3, **made)
    assert_same_fit(bare, parallel, ids(11), rows(11, 2), batch_size=7, epochs=2)


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": True}])
def test_towers_that_cannot_reach_a_table_get_copies(how: dict[str, bool]) -> None:
    made = {"optimizer": OPTIMIZERS["sgd"], "loss": "mse"}
    bare, parallel = pair(sentences, 3, **made)
    parallel.compile(OPTIMIZERS["sgd"](), "mse", **how)
    assert_same_fit(bare, parallel, ids(8), rows(8, 2), batch_size=4, epochs=2)


def test_lora_on_a_table() -> None:
    """What is looked up is then a sum, which is no variable."""

    def build() -> keras.Model:
        model = sentences()
        model.layers[1].enable_lora(2)
        return model

    made = {"optimizer": OPTIMIZERS["sgd"], "loss": "mse"}
    bare, parallel = pair(build, 3, **made)
    assert_same_fit(bare, parallel, ids(11), rows(11, 2), batch_size=7, epochs=2)


def test_the_table_is_not_changed_by_steps_that_only_read_it() -> None:
    parallel = pk.DataParallelModel(sentences(), 3)
    parallel.compile("sgd", "mse")
    before = parallel.template.layers[1].embeddings.numpy()
    parallel.evaluate(ids(11), rows(11, 2), verbose=0)
    parallel.predict(ids(11), verbose=0)
    np.testing.assert_array_equal(parallel.template.layers[1].embeddings.numpy(), before)
    assert "call" not in vars(parallel.template.layers[1])


@pytest.mark.parametrize("towers", [1, 3])
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
@pytest.mark.parametrize("step", ["train_step", "test_step", "predict_step"])
def test_only_rows_travel(step: str, loss_on: str, towers: int) -> None:
    loss_on = "merged" if towers == 1 else loss_on
    parallel = pk.DataParallelModel(sentences(), towers, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    graph = graph_of(parallel, step)
    table = parallel.template.layers[1].embeddings
    assert not reads(graph, table)
    assert all(reads(graph, weight) for weight in parallel.template.weights[1:])
    lookups = [node for node in all_nodes(graph) if node.op == "ResourceGather"]
    assert len(lookups) == 1  # traced once for all towers
    assert lookups[0].device.endswith("CPU:0")  # where the table is, whichever tower asks
    # Nothing of the size of the table is made anywhere, forward or backward.
    shapes = [value.shape for op in graph.get_operations() for value in op.outputs]
    assert not [shape for shape in shapes if shape.rank == 2 and shape[0] == WORDS]


@pytest.mark.parametrize("loss_on", ["towers", "merged"])
def test_small_tables_are_copied(loss_on: str) -> None:
    small = keras.Sequential(
        [keras.Input((TOKENS,), dtype="int32"), keras.layers.Embedding(WORDS // 2, WIDTH)]
    )
    parallel = pk.DataParallelModel(small, 3, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    spec = (tf.TensorSpec((None, TOKENS), tf.int32), tf.TensorSpec((None, TOKENS, WIDTH)))
    step = tf.function(parallel.train_step, autograph=False)
    graph = step.get_concrete_function(spec).graph
    assert reads(graph, small.layers[0].embeddings)
    assert not [node for node in all_nodes(graph) if node.op == "ResourceGather"]


def test_towers_that_share_a_table_overlap_in_time() -> None:
    """A call that takes a resource waits for others that do, unless all of them only read it."""
    barrier = threading.Barrier(2, timeout=60)

    for loss_on in ("merged", "towers"):
        model = keras.Sequential([*sentences().layers, Waits(barrier)])
        parallel = pk.DataParallelModel(model, 2, loss_on=loss_on)
        parallel.compile("sgd", "mse")
        parallel.fit(ids(8), rows(8, 2), batch_size=4, verbose=0)
        parallel.predict(ids(8), batch_size=4, verbose=0)
    assert not barrier.broken


def test_a_step_reads_what_the_last_one_wrote() -> None:
    """Several steps in one function: none may look rows up before they are updated."""
    made = {"optimizer": OPTIMIZERS["sgd"], "loss": "mse", "steps_per_execution": 4}
    bare, parallel = pair(sentences, 3, **made)
    same = np.repeat(ids(1), 24, axis=0)  # the same rows in every step
    assert_same_fit(bare, parallel, same, rows(24, 2), batch_size=3, epochs=2)


def test_gradients_of_a_tape_of_ones_own() -> None:
    bare, parallel = pair(sentences, 3, optimizer="sgd", loss="mse")
    found = []
    for model in (bare, parallel):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(ids(7)) ** 2)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        found.append([tf.convert_to_tensor(gradient).numpy() for gradient in gradients])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=RTOL, atol=ATOL)


def test_copies_leave_handles_alone() -> None:
    variable = keras.Variable(np.ones((3, 2), "float32"))
    sources = [variable.value.handle, weights.read(variable, "/device:CPU:0")]
    copied = Copies(sources, ["/device:CPU:0"] * 2).at("/device:CPU:1")
    assert copied[0] is sources[0]
    assert [is_handle(source) for source in copied] == [True, False]
    np.testing.assert_array_equal(copied[1], np.ones((3, 2)))
    assert Copies([], []).at("/device:CPU:1") == []


def two_towers(template: keras.Model) -> Towers:
    devices = ("/device:CPU:0", "/device:CPU:1")
    homes = Homes(template, devices, "unmoved")
    return Towers(template, devices, devices[0], {}, Alone(2), homes)


def test_which_tables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    template = sentences()
    towers = two_towers(template)
    kinds = collections.Counter(map(is_handle, towers.read_weights(tables=True)))
    assert kinds == {True: 1, False: 4}
    assert not any(map(is_handle, towers.read_weights()))
    monkeypatch.setattr(weights, "SMALLEST_TABLE", 2**40)
    towers = two_towers(template)
    assert not any(map(is_handle, towers.read_weights(tables=True)))
