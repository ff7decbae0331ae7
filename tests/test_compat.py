"""What the private parts of Keras do today, and that there is still no public way."""

import ast
import inspect
import re
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import _compat
from tests.parity import mlp, rows
from tests.versions import needs

PACKAGE = Path(pk.__file__).parent


def compiled() -> keras.Model:
    model = mlp()
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(rows(4, 6), rows(4, 3), verbose=0)
    return model


def test_masks_are_an_attribute_of_tensors() -> None:
    embedded = keras.layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(_compat.get_mask(embedded), [[True, False]])
    other = tf.zeros((1, 2, 2))
    assert _compat.get_mask(other) is None
    _compat.set_mask(other, _compat.get_mask(embedded))
    assert _compat.get_mask(keras.layers.Activation("relu")(other)) is not None
    assert not [name for name in dir(keras.ops) if "mask" in name]


def test_stateless_scope_cannot_be_queried() -> None:
    assert not _compat.in_stateless_scope()
    with keras.StatelessScope():
        assert _compat.in_stateless_scope()
    assert not hasattr(keras, "in_stateless_scope")


def test_compile_arguments_are_the_very_objects() -> None:
    optimizer, metric = keras.optimizers.SGD(), keras.metrics.MeanAbsoluteError()
    model = mlp()
    model.compile(optimizer, "mse", metrics=[metric])
    arguments = _compat.compile_arguments(model)
    assert arguments["optimizer"] is optimizer
    assert arguments["metrics"][0] is metric
    assert arguments["loss"] == "mse"
    public = model.get_compile_config()
    assert public["optimizer"] is not optimizer


def test_loss_arguments_are_not_in_the_config() -> None:
    loss = keras.losses.CosineSimilarity(axis=0)
    assert _compat.loss_arguments(loss)["axis"] == 0
    assert "axis" not in loss.get_config()
    assert _compat.loss_arguments(keras.losses.Loss()) == {}


def test_compiled_losses_and_metrics() -> None:
    model = compiled()
    y, y_pred = tf.constant(rows(4, 3)), model(rows(4, 6))
    expected = np.mean((y - y_pred) ** 2)
    np.testing.assert_allclose(_compat.data_loss(model, y, y_pred, None), expected, rtol=1e-6)
    assert [metric.name for metric in _compat.compiled_metrics(model)] == ["mae"]
    model.reset_metrics()
    _compat.update_metrics(model, y, y_pred, None)
    np.testing.assert_allclose(
        _compat.compiled_metrics(model)[0].result(), np.mean(abs(y - y_pred)), rtol=1e-6
    )
    assert _compat.loss_trackers(model) == []


def test_losses_and_metrics_can_be_built_from_shapes() -> None:
    template = mlp()
    parallel = pk.DataParallelModel(template, 2)
    parallel.compile("sgd", ["mse"], metrics=["mae"])
    assert _compat.compiled_metrics(parallel) == []
    data = (keras.KerasTensor((4, 6)), keras.KerasTensor((4, 3)), None)
    _compat.build_losses_and_metrics(parallel, data)
    assert [metric.name for metric in _compat.compiled_metrics(parallel)] == ["mae"]


def test_layers_of_layers_have_no_public_list() -> None:
    inner = keras.layers.Dense(2)
    outer = keras.layers.TimeDistributed(keras.layers.Bidirectional(keras.layers.LSTM(2)))
    model = keras.Sequential([keras.Input((3, 4, 5)), outer, inner])
    layers = _compat.all_layers(model)
    assert model in layers
    assert any(isinstance(layer, keras.layers.LSTM) for layer in layers)
    assert not hasattr(outer, "layers")


def test_metrics_of_a_compiled_model_mix_its_own_with_those_of_layers() -> None:
    class Tracks(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.tracker = keras.metrics.Mean(name="tracked")

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x

    model = keras.Sequential([keras.Input((3,)), Tracks(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    assert [metric.name for metric in _compat.layer_metrics(model)] == ["tracked"]
    assert "loss" in [metric.name for metric in model.metrics]


def test_variables_cannot_be_moved_publicly() -> None:
    variable = keras.Variable(np.arange(3.0), name="moved")
    _compat.move_variable(variable, "/CPU:2")
    assert variable.value.device.endswith("CPU:2")
    np.testing.assert_array_equal(variable.numpy(), np.arange(3.0))
    assert not hasattr(variable, "device")


def test_moved_variables_keep_the_key_that_optimizers_know() -> None:
    """And what is left behind is emptied: it could only be used by mistake."""
    variable = keras.Variable(np.arange(3.0), name="moved")
    old = variable.value
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([variable])
    _compat.move_variable(variable, "/CPU:2")
    optimizer.apply([tf.ones(3)])
    np.testing.assert_allclose(variable.numpy(), np.arange(3) - 0.1, rtol=1e-5)
    assert tf.raw_ops.ReadVariableOp(resource=old.handle, dtype=old.dtype).shape == (0,)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_keras_asks_before_it_overwrites(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    assert _compat.may_overwrite("a.keras") == (answer == "y")
    assert "a.keras already exists - overwrite?" in asked[0]
    assert not [name for name in dir(keras.utils) if "overwrite" in name]


def test_nothing_private_is_used_elsewhere() -> None:
    private = re.compile(r"keras\.src|tensorflow\.python|__internal__|\.extended\._")
    uses = [
        f"{path.name}: {line}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_compat.py"
        for line in path.read_text().splitlines()
        if private.search(line)
    ]
    assert uses == []


def test_training_reaches_layers_that_do_not_take_it() -> None:
    found: list[Any] = []

    class Asks(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            found.append(_compat.training_of_call(self))
            return x

    model = keras.Sequential([keras.Input((3,)), Asks()])
    found.clear()
    model(tf.zeros((2, 3)), training=True)
    model(tf.zeros((2, 3)), training=False)
    assert found == [True, False]
    assert not hasattr(model.layers[0], "training")


def test_logits_are_an_attribute_of_tensors() -> None:
    logits = tf.constant([[1.0, 2.0]])
    probabilities = keras.activations.softmax(logits)
    assert _compat.get_logits(probabilities) is logits
    assert _compat.get_logits(logits) is None
    saturated = tf.constant([[0.0, 1.0]])
    _compat.set_logits(saturated, tf.constant([[0.0, 60.0]]))
    loss = keras.losses.categorical_crossentropy([[1.0, 0.0]], saturated)
    np.testing.assert_allclose(loss, 60, rtol=1e-6)
    _compat.set_logits(logits, None)
    assert not hasattr(logits, "_keras_logits")
    assert not hasattr(probabilities, "logits")


def test_no_mask_is_not_attached() -> None:
    tensor = tf.zeros(1)
    _compat.set_mask(tensor, None)
    assert not hasattr(tensor, "_keras_mask")
    _compat.set_mask(tensor, tf.constant([True]))
    _compat.set_mask(tensor, None)
    assert _compat.get_mask(tensor) is not None


def test_data_loss_is_without_what_compute_loss_adds() -> None:
    regularizer = keras.regularizers.L2(1.0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, kernel_regularizer=regularizer)]
    )
    model.compile("sgd", "mse", weighted_metrics=["mse"])
    x, y, weights = rows(4, 6), rows(4, 3), np.array([1, 0, 2, 5], "float32")
    y_pred = model(x)
    expected = np.mean(weights * np.mean((y - y_pred) ** 2, axis=1))
    np.testing.assert_allclose(_compat.data_loss(model, y, y_pred, weights), expected, rtol=1e-6)
    public = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weights)
    assert float(public) > expected + 0.1
    _compat.update_metrics(model, y, y_pred, weights)
    np.testing.assert_allclose(
        _compat.compiled_metrics(model)[0].result(), expected * 4 / weights.sum(), rtol=1e-6
    )
    assert not hasattr(model, "data_loss")


def test_loss_trackers_are_among_other_metrics() -> None:
    inputs = keras.Input((6,))
    outputs = {name: keras.layers.Dense(3, name=name)(inputs) for name in "ab"}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    model.fit(rows(4, 6), {"a": rows(4, 3), "b": rows(4, 3)}, verbose=0)
    trackers = _compat.loss_trackers(model)
    assert [tracker.name for tracker in trackers] == ["a_loss", "b_loss"]
    assert len(model.metrics) > len(trackers)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_moved_variables_stay_what_they_were(dtype: str, trainable: bool) -> None:
    variable = keras.Variable(np.arange(3), dtype=dtype, trainable=trainable, name="moved")
    _compat.move_variable(variable, "/CPU:2")
    assert variable.trainable == variable.value.trainable == trainable
    assert variable.dtype == variable.value.dtype.name == dtype
    variable.assign([4, 5, 6])
    np.testing.assert_array_equal(variable.numpy(), [4, 5, 6])


@pytest.mark.parametrize(
    "name",
    [
        *("SGD", "Adam", "Adafactor", "RMSprop", "Ftrl", "Nadam"),
        pytest.param("Muon", marks=needs("optimizers.Muon")),
    ],
)
def test_slots_are_beside_their_weights(name: str) -> None:
    """As many weights as an optimizer has numbers of its own, which are no slots."""
    weights = [keras.Variable(np.zeros(shape, "float32")) for shape in ((2, 3), (3,))]
    made = {"use_ema": True, "gradient_accumulation_steps": 2}
    optimizer = getattr(keras.optimizers, name)(0.1, **made)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(weights)
    pairs = _compat.slots(optimizer)
    for weight in weights:
        of_weight = [slot for slot, owner in pairs if owner is weight]
        assert len(of_weight) >= 2
        assert len({id(slot) for slot in of_weight}) == len(of_weight)
    numbers = {id(v) for v in optimizer.variables} - {id(slot) for slot, _ in pairs}
    assert {v.shape for v in optimizer.variables if id(v) in numbers} == {tf.TensorShape(())}
    rest = {id(v) for v in optimizer.variables if v.shape.rank} - {id(slot) for slot, _ in pairs}
    assert not rest


def test_numbers_are_read_once_until_they_are_assigned() -> None:
    number = keras.Variable(2.0)

    @tf.function
    def step() -> list[tf.Tensor]:
        with _compat.read_once([number]):
            first = [number + 1.0, number * 2.0]
            number.assign_add(1.0)
            again = [number + 1.0, number * 2.0]
            number.value.assign_sub(1.0)
            last = tf.cond(number > 0, lambda: number + 0.0, lambda: number - 1.0)
        return [*first, *again, last]

    graph = step.get_concrete_function().graph
    reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
    assert len(reads) == 3
    assert [float(value) for value in step()] == [3, 4, 4, 6, 2]
    assert "value" not in vars(number.value)
    assert float(number + 1.0) == 3


def test_whether_a_tape_records() -> None:
    assert not _compat.may_be_recorded()
    with tf.GradientTape() as tape:
        assert _compat.may_be_recorded()
        with tape.stop_recording():
            assert not _compat.may_be_recorded()
    with tf.autodiff.ForwardAccumulator(tf.constant(1.0), tf.constant(1.0)):
        assert _compat.may_be_recorded()


def test_the_open_scope() -> None:
    assert _compat.stateless_scope() is None
    with keras.StatelessScope() as scope:
        assert _compat.stateless_scope() is scope


def test_what_a_graph_takes_from_outside() -> None:
    found: list[Any] = []

    @tf.function
    def outer(x: tf.Tensor) -> tf.Tensor:
        twice = 2 * x

        @tf.function
        def inner() -> tf.Tensor:
            found.append((twice, _compat.captured(twice + 0.0), tf.identity(twice)))
            return twice + 1.0

        return inner()

    outer(tf.constant(1.0))
    outside, of_sum, inside = found[0]
    assert _compat.captured(inside.op.inputs[0]) is outside
    assert of_sum is None


def test_what_an_optimizer_was_built_for() -> None:
    optimizer = keras.optimizers.Adam()
    variables = [keras.Variable([1.0]), keras.Variable([2.0, 3.0])]
    optimizer.build(variables)
    assert [id(v) for v in _compat.optimized(optimizer)] == [id(v) for v in variables]


def test_whether_losses_and_metrics_have_their_variables() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    assert not _compat.losses_and_metrics_are_built(model)
    model.train_on_batch(np.ones((3, 2)), np.ones((3, 1)))
    assert _compat.losses_and_metrics_are_built(model)


def test_every_function_has_a_test() -> None:
    public = {name for name, value in vars(_compat).items() if inspect.isfunction(value)}
    used = set(re.findall(r"_compat\.(\w+)\(", Path(__file__).read_text()))
    assert public <= used


def foreign_private_names(source: str) -> list[str]:
    """Private attributes of other objects than `self` and `cls`, and private imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = node.value
            # os._exit is public in all but its name.
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls", "os")):
                found.append(ast.unparse(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [
                name
                for name in names
                if re.search(r"keras\.src|tensorflow\.python|__internal__", name)
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and re.match(r"_[a-z]", str(name.value)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "x._keras_mask",
        "self.model._compile_loss",
        "getattr(x, '_keras_mask', None)",
        "from keras.src import backend",
        "import tensorflow.python.eager",
    ],
)
def test_private_uses_are_found(source: str) -> None:
    assert foreign_private_names(source)


def test_no_private_attribute_of_others_is_used_elsewhere() -> None:
    uses = {
        path.name: foreign_private_names(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name != "_compat.py"
    }
    assert {name: found for name, found in uses.items() if found} == {}


def test_functions_are_inlined_in_one_thread_only() -> None:
    calls = []

    @tf.function
    def function(x: tf.Tensor) -> tf.Tensor:
        calls.append(tf.compat.v1.get_default_graph())
        return tf.constant(1.0) if x > 0 else tf.constant(-1.0)

    def elsewhere() -> None:
        assert float(function(tf.constant(2.0))) == 1

    @tf.function(autograph=False)
    def outer(x: tf.Tensor) -> tf.Tensor:
        with _compat.inlined_functions(), _compat.inlined_functions():
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
            return function(x) * 2

    before = type(function).__call__
    assert float(outer(tf.constant(-3.0))) == -2
    assert type(function).__call__ is before
    assert function.experimental_get_tracing_count() == 1  # elsewhere
    assert outer.get_concrete_function(tf.constant(-3.0)).graph in calls


def test_functions_of_tensorflow_are_traced_also_where_others_are_inlined() -> None:
    with _compat.inlined_functions():
        assert tf.vectorized_map(lambda x: 2 * x, tf.ones((3,))).numpy().tolist() == [2, 2, 2]


def test_global_seed_without_a_new_start() -> None:
    tf.random.set_seed(5)
    first = [float(tf.random.uniform(())) for _ in range(3)]
    tf.random.set_seed(5)
    assert float(tf.random.uniform(())) == first[0]
    with _compat.eager_seed(6):
        assert _compat.global_seed() == 6
        assert float(tf.random.uniform(())) != first[1]
    assert _compat.global_seed() == 5
    assert float(tf.random.uniform(())) == first[2]
    assert not hasattr(tf.random, "get_seed")


def test_lookups_leave_a_table_as_it_is() -> None:
    _compat.mark_lookups()
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2]), 0)
    function = tf.function(table.lookup).get_concrete_function(tf.TensorSpec((), tf.int32))
    graph = (
        tf.function(lambda x: function(x) + function(x))
        .get_concrete_function(tf.TensorSpec((), tf.int32))
        .graph
    )
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    assert len(calls) == 2
    assert not any(call in other.control_inputs for call in calls for other in calls)


def test_shapes_are_found_where_keras_cannot() -> None:
    class Counts(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.n = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            tf.cond(x[0, 0] > 0, lambda: self.n.assign_add(1.0), lambda: tf.constant(0.0))
            return x[:, :1] + self.n

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.counts = Counts()

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.counts(x)

    model, error = Model(), ValueError("as Keras says")
    given = keras.KerasTensor((None, 3))
    with pytest.raises(Exception, match="counts"):
        model(given)
    found = _compat.trace_as_step(model, (given,), {}, error)
    assert found.shape == (None, 1)
    assert float(model.counts.n) == 0
    with pytest.raises(ValueError, match="as Keras says"):
        _compat.trace_as_step(model, (keras.KerasTensor((None,)),), {}, error)


def test_strategy_timeout() -> None:
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=7)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    assert _compat.strategy_timeout(strategy) == 7
    assert _compat.strategy_timeout(tf.distribute.MultiWorkerMirroredStrategy()) is None


def test_initial_epoch() -> None:
    """`fit` starts where a callback that restores a state says."""

    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            assert not _compat.get_initial_epoch(self.model)
            _compat.set_initial_epoch(self.model, 2)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
    history = model.fit(*data, epochs=3, verbose=0, callbacks=[Restore()])
    assert history.epoch == [2]
    assert _compat.get_initial_epoch(model) == 2


def test_functions_of_a_graph_have_no_public_way() -> None:
    @tf.function(autograph=False)
    def inner(x: tf.Tensor) -> tf.Tensor:
        return tf.sin(x)

    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [3])
        (call,) = {inner(x).op.inputs[0].op, inner(x).op} & {
            op for op in graph.get_operations() if "Call" in op.type
        }
        body = _compat.function_body(call)
        assert [op.type for op in body.get_operations()][:2] == ["Placeholder", "Sin"]
        assert len(body.inputs) == len(call.inputs)
        assert len(body.outputs) == len(call.outputs)
        assert _compat.function_body(tf.sin(x).op) is None
    public = [name for name in dir(tf.Graph) if "function" in name and name[0] != "_"]
    assert public == ["building_function"]


def test_none_in_a_dataset_has_a_spec_of_its_own() -> None:
    data = tf.data.Dataset.from_tensors({"a": tf.zeros(3), "b": None})
    assert _compat.is_none_spec(data.element_spec["b"])
    assert not _compat.is_none_spec(data.element_spec["a"])


def test_flags_by_position_are_refused_unless_a_layer_says_otherwise() -> None:
    class Flips(keras.Model):
        def call(self, x: tf.Tensor, flip: bool) -> tf.Tensor:
            return -x if flip else x

    model = Flips()
    with pytest.raises(ValueError, match="Only input tensors may be passed as positional"):
        model(tf.ones(2), True)
    _compat.allow_any_arguments(model)
    np.testing.assert_array_equal(model(tf.ones(2), True), [-1, -1])


def test_two_models_can_share_what_they_are_compiled_with() -> None:
    one, other = compiled(), mlp()
    other.compile("sgd", "mse", metrics=["mae"])
    assert [id(m) for m in other.metrics] != [id(m) for m in one.metrics]
    _compat.share_compiled(other, one)
    assert [id(m) for m in other.metrics] == [id(m) for m in one.metrics]


def test_owners_of_terms_are_not_public() -> None:
    class Adds(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            self.add_loss(tf.reduce_sum(x))
            return x

    inner = Adds()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), inner])
    with keras.StatelessScope(collect_losses=True) as scope:
        model(tf.ones((2, 3)))
    (term,) = scope.losses
    owner = _compat.loss_owners(model)[id(term)]
    assert _compat.all_layers(model)[owner] is inner
    _compat.forget_loss_owners(model)
    assert _compat.loss_owners(model) == {}


def test_what_tapes_will_ask_for_is_not_public() -> None:
    x = tf.constant(1.0)
    assert _compat.gradient_order([x]) == 0
    with tf.GradientTape() as tape:
        assert _compat.gradient_order([x]) == 0
        tape.watch(x)
        assert _compat.gradient_order([x]) == 1
        with tf.GradientTape() as inner:
            inner.watch(x)
            assert _compat.gradient_order([x]) == 2
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        assert _compat.gradient_order([x]) == 2
    assert _compat.gradient_order([]) == 0


def test_batches_of_other_sizes_are_joined_as_keras_does() -> None:
    """Goes when Keras says publicly what they become."""
    batches = [tf.zeros((2, 3, 1)), tf.zeros((1, 4, 1))]
    joined = _compat.ragged_concat(batches)
    model = keras.Sequential([keras.Input((None, 1)), keras.layers.Identity()])
    data = (batch for batch in batches)
    dataset = tf.data.Dataset.from_generator(
        lambda: data, output_signature=tf.TensorSpec((None, None, 1))
    )
    expected = model.predict(dataset, steps=2, verbose=0)
    assert type(joined) is type(expected)
    assert joined.shape.as_list() == expected.shape.as_list() == [3, None, 1]
    assert joined.dtype == expected.dtype


def test_autograph_cannot_be_told_publicly_what_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked whether the code that runs is translated: tests/test_autograph.py is about both."""
    public = {name for name in dir(tf.autograph) if not name.startswith("_")}
    assert public == {"experimental", "set_verbosity", "to_code", "to_graph", "trace"}
    public = {name for name in dir(tf.autograph.experimental) if not name.startswith("_")}
    assert public == {"Feature", "do_not_convert", "set_loop_options"}
    with _compat.autograph_here() as here:
        assert here.status.name == "UNSPECIFIED"
    untranslated = _compat.as_called_by_user(lambda: _compat.autograph_here().status.name)
    assert untranslated() == "UNSPECIFIED"
    before = _compat._autograph_config.CONVERSION_RULES
    monkeypatch.setattr(_compat._autograph_config, "CONVERSION_RULES", before)
    _compat.keep_from_autograph("nothing_of_this_name")
    assert _compat._autograph_config.CONVERSION_RULES[1:] == before
