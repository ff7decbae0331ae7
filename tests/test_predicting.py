"""Issue 14: what `predict` gives where the host joins what the towers returned."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import parts
from tests.parity import ATOL, RTOL, rows

TOWERS = 3


class Outputs(keras.Model):
    """Returns a nest of all kinds of outputs that have rows, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(5, activation="softmax")

    def call(self, x: Any) -> Any:
        h = self.dense(x)
        kinds = {
            "word": tf.argmax(h, axis=-1),
            "half": tf.cast(h, tf.bfloat16),
            "text": tf.strings.as_string(tf.argmax(h, axis=-1)),
            "mean": tf.reduce_mean(h),
        }
        return [h[:, None], kinds]


class Kinds(Outputs):
    """The same with what NumPy does not know."""

    def call(self, x: Any) -> Any:
        h = self.dense(x)
        lengths = tf.cast(10 * h[:, 0], tf.int32)
        sparse = tf.sparse.from_dense(tf.where(h > 0.2, h, tf.zeros_like(h)))
        return (*super().call(x), tf.RaggedTensor.from_tensor(h, lengths=lengths), sparse)


class Doubles(Outputs):
    """A template with a step of its own, which sees tensors."""

    def predict_step(self, data: Any) -> Any:
        outputs = super().predict_step(data)
        return tf.concat([outputs[0], outputs[0]], axis=-1)


class SeesOutputs(pk.DataParallelModel):
    """A wrapper with a step of its own, which sees tensors."""

    def predict_step(self, data: Any) -> Any:
        outputs = super().predict_step(data)
        return tf.concat([outputs[0], outputs[0]], axis=-1)


@pytest.fixture(autouse=True)
def every_output_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LARGE_ROW", 0)
    monkeypatch.setattr(parts, "_LARGE", 0)


def wrapped(template: keras.Model, **compiled: Any) -> keras.Model:
    if not template.built:
        template(rows(2, 4))
    template.compile(**compiled)
    return pk.DataParallelModel(template, TOWERS)


def check_same(found: Any, expected: Any) -> None:
    """Holds outputs to those of the bare model: their values, and what they are."""
    keras.tree.assert_same_structure(found, expected)
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        values = [tf.nest.flatten(each, expand_composites=True) for each in (one, other)]
        for mine, theirs in zip(*(map(np.asarray, each) for each in values), strict=True):
            assert mine.shape == theirs.shape
            if theirs.dtype == object:
                np.testing.assert_array_equal(mine, theirs)
            else:
                wide = [each.astype("float64") for each in (mine, theirs)]
                rtol = 1e-2 if theirs.itemsize == 2 else RTOL  # bfloat16 has 8 bits.
                np.testing.assert_allclose(*wide, rtol=rtol, atol=ATOL)


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        (Kinds, {}),
        (Kinds, {"run_eagerly": True}),
        (Kinds, {"steps_per_execution": 2}),
        (Doubles, {}),
    ],
)
def test_all_kinds_of_outputs(kind: type[Outputs], compiled: dict[str, Any]) -> None:
    template = kind()
    parallel = wrapped(template, **compiled)
    # The last batch has fewer rows than there are towers.
    x = rows(14, 4)
    for size in (4, 14):
        found = parallel.predict(x, batch_size=size, verbose=0)
        check_same(found, template.predict(x, batch_size=size, verbose=0))
    check_same(parallel.predict_on_batch(x), template.predict_on_batch(x))
    # Whoever calls the function by himself gets tensors.
    parallel.make_predict_function()
    template.make_predict_function()
    check_same(parallel.predict_function([(x,)]), template.predict_function([(x,)]))


def test_wrapper_with_a_step_of_its_own() -> None:
    template = Outputs()
    template(rows(2, 4))
    x = rows(7, 4)
    found = SeesOutputs(template, TOWERS).predict(x, batch_size=5, verbose=0)
    once = template.predict(x, batch_size=5, verbose=0)[0]
    check_same(found, np.concatenate([once, once], axis=-1))


def test_towers_under_xla() -> None:
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="tanh")])
    parallel = wrapped(template, jit_compile=True)
    x = rows(7, 4)
    found = parallel.predict(x, batch_size=4, verbose=0)
    check_same(found, template.predict(x, batch_size=4, verbose=0))


class Reads(keras.callbacks.Callback):
    """Keeps the outputs of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Any] = []

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch
        self.read.append(logs["outputs"])


@pytest.mark.parametrize("kind", [Outputs, Kinds])
def test_callbacks_read_what_keras_gives(kind: type[Outputs]) -> None:
    template = kind()
    parallel = wrapped(template)
    x, read = rows(7, 4), []
    for model in (template, parallel):
        reads = Reads()
        found = model.predict(x, batch_size=4, verbose=0, callbacks=[reads])
        read.append((found, reads.read))
    expected, found = read
    check_same(found[0], expected[0])
    assert len(found[1]) == 2
    for mine, theirs in zip(found[1], expected[1], strict=True):
        check_same(mine, theirs)


@pytest.mark.parametrize(
    "hook", ["on_predict_begin", "on_predict_batch_begin", "on_predict_batch_end", "on_predict_end"]
)
def test_callbacks_call_the_function(hook: str) -> None:
    """What they get is theirs, and the run does not take it for a batch of its own."""
    template = Outputs()
    parallel = wrapped(template)
    template.make_predict_function()
    parallel.make_predict_function()
    x, calls = rows(7, 4), []

    def call(*_: Any, logs: Any = None) -> None:
        calls.append(parallel.predict_function([(x[:5],)]))

    callback = keras.callbacks.Callback()
    setattr(callback, hook, call)
    found = parallel.predict(x, batch_size=4, verbose=0, callbacks=[callback])
    check_same(found, template.predict(x, batch_size=4, verbose=0))
    for each in calls:
        check_same(each, template.predict_function([(x[:5],)]))


def test_batches_of_other_lengths_become_ragged() -> None:
    template = keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(2)])
    parallel = wrapped(template)
    data = [rows(count, length, 3) for count, length in ((5, 4), (4, 4), (2, 6))]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(data), output_signature=tf.TensorSpec((None, None, 3))
    ).apply(tf.data.experimental.assert_cardinality(3))
    check_same(parallel.predict(dataset, verbose=0), template.predict(dataset, verbose=0))


@pytest.mark.parametrize("sizes", [(1, 5, 2), (5, 1)])
def test_first_batch_decides_for_all(sizes: tuple[int, ...]) -> None:
    """A batch of one row comes from one tower, and is not in parts."""
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    parallel = wrapped(template)
    data = [rows(size, 4, seed=size) for size in sizes]
    found, expected = (
        model.predict(((batch,) for batch in data), steps=len(sizes), verbose=0)
        for model in (parallel, template)
    )
    check_same(found, expected)


@pytest.mark.parametrize("in_parts", [False, True])
def test_no_operation_joins_the_outputs(in_parts: bool) -> None:
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(77)])
    parallel = wrapped(template)
    steps = parallel._steps
    keras.Model.make_predict_function(parallel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.predicting, "in_parts", in_parts)
        function = parallel.predict_function.get_concrete_function([(tf.TensorSpec((7, 4)),)])
    joins = [op for op in function.graph.get_operations() if op.type == "ConcatV2"]
    assert bool([op for op in joins if op.outputs[0].shape[-1] == 77]) is not in_parts
