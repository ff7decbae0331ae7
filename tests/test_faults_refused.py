"""Faults found by running real programs bare and wrapped: what is refused, and how to go on.

The id above each test is that of the kind of fault.
"""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_variables, mlp, pair, rows


@pytest.mark.parametrize("what", ["built", "unbuilt", "inner", "optimizer", "wrapping"])
def test_models_of_a_strategy_are_refused(what: str) -> None:
    """X23: in words that say what to leave out."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    template = mlp()
    with strategy.scope():
        made = {
            "built": mlp,
            "unbuilt": lambda: keras.Sequential([keras.layers.Dense(1)]),
            "inner": mlp,
        }.get(what, lambda: template)()
        if what == "optimizer":
            optimizer = keras.optimizers.Adam()
            optimizer.build(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).variables)
        if what == "wrapping":
            with pytest.raises(ValueError, match=r"outside of the scope.*MirroredStrategy"):
                pk.DataParallelModel(template, 2)
            return
    if what == "inner":
        inputs = keras.Input((6,))
        made = keras.Model(inputs, made(inputs))
    if what == "optimizer":
        made.compile(optimizer, "mse")
    for devices in (1, 2):
        with pytest.raises(ValueError, match=r"outside of the scope.*MirroredStrategy.*Leave out"):
            pk.DataParallelModel(made, devices)


class Passes(keras.layers.Layer):
    """Messages along the edges of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = keras.layers.Dense(4, "tanh"), keras.layers.Dense(4)

    def call(self, graph: Any) -> Any:
        states, edges = graph
        sent = self.message(tf.gather(states, edges[:, 0]))
        heard = tf.math.unsorted_segment_sum(sent, edges[:, 1], tf.shape(states)[0])
        return self.update(tf.concat([states, heard], -1))


class GraphNet(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.passing, self.top = Passes(), keras.layers.Dense(2)

    def call(self, graph: Any) -> Any:
        return self.top(self.passing((graph["states"], graph["edges"])))


class GraphNetWithSteps(GraphNet):
    def train_step(self, data: Any) -> Any:
        graph, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(graph, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def graphs() -> tf.data.Dataset:
    """Two graphs of other sizes."""

    def generate() -> Any:
        for nodes, edges in ((6, 9), (4, 13)):
            among = np.random.default_rng(nodes).integers(0, nodes, (edges, 2))
            yield {"states": rows(nodes, 3), "edges": among}, rows(nodes, 2, seed=1)

    graph = {"states": tf.TensorSpec((None, 3)), "edges": tf.TensorSpec((None, 2), tf.int64)}
    signature = (graph, tf.TensorSpec((None, 2)))
    data = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(2))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", [GraphNet, GraphNetWithSteps])
def test_a_model_whose_batch_cannot_be_cut(kind: Any, eager: bool, devices: int) -> None:
    """X24: `rules={"batch": "whole"}` runs it on the first device; one device needs no rule."""
    rules = {"batch": "whole"} if devices > 1 else None
    bare, parallel = pair(
        kind, devices, rules=rules, optimizer="adam", loss="mse", run_eagerly=eager
    )
    histories = [
        m.fit(graphs(), epochs=2, shuffle=False, verbose=0).history for m in (bare, parallel)
    ]
    np.testing.assert_allclose(histories[1]["loss"], histories[0]["loss"], rtol=RTOL, atol=ATOL)
    assert_same_variables(bare, parallel)
    results = [m.evaluate(graphs(), verbose=0) for m in (bare, parallel)]
    np.testing.assert_allclose(results[1], results[0], rtol=RTOL, atol=ATOL)
    graph, _ = next(iter(graphs()))
    np.testing.assert_allclose(parallel(graph), bare(graph), rtol=RTOL, atol=ATOL)


def test_what_else_an_uncut_batch_allows() -> None:
    """X24: state by row, a fixed batch size, inputs without rows."""
    inputs = keras.Input((4, 3), batch_size=5)
    template = keras.Model(inputs, keras.layers.LSTM(2, stateful=True)(inputs))
    parallel = pk.DataParallelModel(template, 3, rules={"batch": "whole"})
    assert parallel.num_towers == 1
    x = rows(5, 4, 3)
    first, second = parallel(x), parallel(x)
    assert not np.allclose(first, second)

    class Adds(keras.Model):
        def call(self, pair: Any) -> Any:
            return pair[0] + pair[1]

    assert float(pk.DataParallelModel(Adds(), 1)((tf.constant(1.0), tf.constant(2.0)))) == 3


def test_what_cannot_be_cut_says_what_to_write() -> None:
    """X24: where rows differ, and where there are none."""
    remedy = r'rules={"batch": "whole"}'
    parallel = pk.DataParallelModel(GraphNet(), 3)
    with pytest.raises(ValueError, match=rf"same number of rows.*{remedy}"):
        parallel({"states": rows(5, 3), "edges": np.zeros((4, 2), int)})
    with pytest.raises(ValueError, match=rf"at least one tensor that has rows.*{remedy}"):
        parallel(tf.constant(1.0))
    parallel.compile("sgd", "mse")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"has another number of rows.*batch"):
        parallel.fit(graphs(), shuffle=False, verbose=0)


def test_several_machines_cut() -> None:
    """X24: all of them would compute the same."""
    from parallel_keras.steps import checks

    with pytest.raises(ValueError, match="can be cut where there are several machines"):
        checks.is_uncut({"batch": "whole"}, object())
    assert not checks.is_uncut({"x": "whole"}, object())
