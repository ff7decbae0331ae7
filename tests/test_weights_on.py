"""Weights that live on all devices: the numbers, files and methods of one device.

`links` has the library take logical CPUs for devices behind links, as GPUs are: then messages are
packed and towers are put into the step's graph, and the numbers are computed for real.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.homes import links, messages
from parallel_keras.homes import plan as homes
from tests.parity import (
    assert_same_fit,
    assert_same_variables,
    batches,
    mlp,
    pair,
    rows,
)
from tests.versions import has

L = keras.layers
TOWERS = 3
SIZES = (7, 4, 1, 2, 5)  # uneven, and twice fewer rows than towers


@pytest.fixture
def links_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "is_gpu", lambda device: bool(device))


def place(variable: keras.Variable) -> str:
    return str(variable.value.device)[-5:]


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9)


def normalised() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            L.Dense(7, activation="tanh"),
            L.BatchNormalization(synchronized=True),
            L.Dense(5),
            L.BatchNormalization(synchronized=True, momentum=0.8),
            L.Dense(3),
        ]
    )


def regularised() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            L.Dense(7, kernel_regularizer="l2", bias_regularizer=keras.regularizers.L2(0.1)),
            L.Dense(5, activity_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(1.0)),
            L.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1)),
        ]
    )


def shared_layers() -> keras.Model:
    first, second = keras.Input((6,)), L.Dense(6, activation="tanh", kernel_regularizer="l2")
    return keras.Model(first, L.Dense(3)(second(second(first))))


def frozen() -> keras.Model:
    model = mlp()
    model.layers[0].trainable = False
    return model


def with_lora() -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, activation="tanh"), L.Dense(3)])
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(rows(2, 8, seed=5))
    return model


def embedded(words: int, width: int) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        inputs = keras.Input((6,))
        hidden = L.Flatten()(L.Embedding(words, width)(inputs))
        return keras.Model(inputs, L.Dense(3)(hidden))

    return build


def counting() -> keras.Model:
    class Counts(L.Layer):
        def build(self, shape: Any) -> None:
            add = self.add_weight
            self.steps = add(shape=(), initializer="zeros", dtype="int64", trainable=False)
            self.sums = add(shape=(6,), initializer="zeros", trainable=False)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            self.steps.assign_add(1)
            before = tf.convert_to_tensor(self.sums)  # after: what the shard alone comes to
            self.sums.assign(0.9 * before + 0.1 * tf.reduce_mean(x, axis=0))
            return x + before

    return keras.Sequential([keras.Input((6,)), Counts(), L.Dense(3)])


def mixed() -> keras.Model:
    hidden = L.Dense(7, activation="tanh", kernel_regularizer="l2", dtype="mixed_float16")
    return keras.Sequential([keras.Input((6,)), hidden, L.Dense(3, dtype="float32")])


def two_outputs() -> keras.Model:
    inputs = keras.Input((6,))
    hidden = L.Dense(7, activation="tanh")(inputs)
    return keras.Model(inputs, {"a": L.Dense(3)(hidden), "b": L.Dense(3)(hidden)})


def scaled(scale: float = 2.0**10) -> keras.optimizers.Optimizer:
    inner = keras.optimizers.Adam(0.01, clipnorm=0.5)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale, dynamic_growth_steps=2)


O = keras.optimizers  # noqa: E741
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "clipnorm": lambda: O.SGD(0.5, clipnorm=0.1),
    "clipvalue": lambda: O.SGD(0.5, clipvalue=0.02),
    "global clipnorm": lambda: O.Adam(0.01, global_clipnorm=0.1),
    "decay": lambda: O.AdamW(0.01, weight_decay=0.3),
    "average": lambda: O.SGD(0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2),
    "accumulated": lambda: O.Adam(0.01, gradient_accumulation_steps=2, global_clipnorm=0.5),
    "schedule": lambda: O.Adam(O.schedules.ExponentialDecay(0.05, 2, 0.5)),
    "adafactor": lambda: O.Adafactor(0.01),
    "nadam": lambda: O.Nadam(0.01),
    "muon": lambda: O.Muon(0.01),
    "schedule-free": lambda: O.ScheduleFreeAdamW(0.01),
    "rmsprop": lambda: O.RMSprop(0.01, momentum=0.5, centered=True),
    "ftrl": lambda: O.Ftrl(0.01),
    "lamb": lambda: O.Lamb(0.01),
    "lion": lambda: O.Lion(0.001),
    "scaled": lambda: scaled(),
    "static scale": lambda: O.Adam(0.01, loss_scale_factor=64.0),
    # Overflows at first, so that steps are skipped.
    "scaled too much": lambda: scaled(2.0**127),
}
# Those that this Keras has.
OPTIMIZERS = {
    name: make
    for name, make in OPTIMIZERS.items()
    if has(
        {"muon": "optimizers.Muon", "schedule-free": "optimizers.ScheduleFreeAdamW"}.get(
            name, "ops"
        )
    )
}
MODELS: dict[str, Callable[[], keras.Model]] = {
    "normalised": normalised,
    "regularised": regularised,
    "shared": shared_layers,
    "frozen": frozen,
    "LoRA": with_lora,
    "embedding": embedded(40, 8),
    "table": embedded(8192, 32),
    "state": counting,
}


def data(*, ids: bool = False) -> tf.data.Dataset:
    count = sum(SIZES)
    x = rows(count, 6)
    if ids:
        x = (x * 0 + np.arange(count * 6).reshape(x.shape) % 37).astype("float32")
    return batches(SIZES, x, rows(count, 3, seed=1))


@pytest.mark.sweep(3)
@pytest.mark.usefixtures("links_between")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, loss_on: str) -> None:
    """Clipping, loss scales, averages and slots are those of one device, beside their weights."""
    made = {"optimizer": OPTIMIZERS[name], "loss": "mse", "metrics": ["mae"]}
    bare, parallel = pair(regularised, TOWERS, loss_on=loss_on, weights_on="spread", **made)
    # A scale that overflows turns tiny gradients into zeros, here as there.
    assert_same_fit(bare, parallel, data(), epochs=2, rtol=1e-4 if name == "muon" else 1e-5)
    assert {place(weight) for weight in parallel.trainable_weights} == {"CPU:0", "CPU:1", "CPU:2"}
    for slot, weight in slots(parallel.optimizer):
        assert place(slot) == place(weight), slot.path


def slots(optimizer: Any) -> list[tuple[keras.Variable, keras.Variable]]:
    """By their names, which begin with that of the weight."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    weights = optimizer._trainable_variables
    return [
        (slot, weight)
        for slot in optimizer.variables
        for weight in weights
        if slot.name.startswith(weight.path.replace("/", "_") + "_")
    ]


@pytest.mark.sweep(1)
@pytest.mark.usefixtures("links_between")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, loss_on: str) -> None:
    made = {"optimizer": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.3), "loss": "mse"}
    bare, parallel = pair(MODELS[name], TOWERS, loss_on=loss_on, weights_on="spread", **made)
    ids = name in ("embedding", "table")
    assert_same_fit(bare, parallel, data(ids=ids), epochs=2)
    expected, actual = (
        model.evaluate(data(ids=ids), verbose=0, return_dict=True) for model in (bare, parallel)
    )
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, err_msg=key)
    x = next(iter(data(ids=ids)))[0]
    np.testing.assert_allclose(parallel(x), bare(x), rtol=1e-5, atol=2e-6)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("name", ["regularised", "normalised", "table"])
def test_models_without_links(name: str, loss_on: str) -> None:
    """On CPUs weights are spread too where that is asked for; nothing is packed."""
    made = {"optimizer": lambda: sgd(), "loss": "mse", "metrics": ["mae"]}
    bare, parallel = pair(MODELS[name], TOWERS, loss_on=loss_on, weights_on="spread", **made)
    assert_same_fit(bare, parallel, data(ids=name == "table"), epochs=2)


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("links_between")
@pytest.mark.parametrize("loss_on", ["merged", "towers"])
@pytest.mark.parametrize("how", ["eager", "jit", "mixed", "several steps", "two outputs"])
def test_ways_to_run(how: str, loss_on: str) -> None:
    made: dict[str, Any] = {"optimizer": lambda: sgd(), "loss": "mse", "metrics": ["mae"]}
    build, rtol = regularised, 1e-5
    if how == "eager":
        made["run_eagerly"] = True
    elif how == "jit":
        made["jit_compile"] = True
    elif how == "several steps":
        made["steps_per_execution"] = 2
    elif how == "mixed":
        build, made["optimizer"], rtol = mixed, lambda: scaled(), 1e-2  # half precision: 3 digits
    elif how == "two outputs":
        build, made["metrics"] = two_outputs, {"a": ["mae"], "b": ["mse"]}
        x, y = rows(12, 6), rows(12, 3, seed=1)
        bare, parallel = pair(build, TOWERS, loss_on=loss_on, weights_on="spread", **made)
        assert_same_fit(bare, parallel, x, {"a": y, "b": 2 * y}, batch_size=7, epochs=2)
        return
    bare, parallel = pair(build, TOWERS, loss_on=loss_on, weights_on="spread", **made)
    assert_same_fit(bare, parallel, data(), epochs=2, rtol=rtol)


class TwoOptimizers(keras.Model):
    """A step of its own, with an optimizer for each half and weight regularisers."""

    def __init__(self) -> None:
        super().__init__()
        inputs, hidden = keras.Input((6,)), keras.Input((5,))
        self.lower = keras.Model(inputs, L.Dense(5, "tanh", kernel_regularizer="l2")(inputs))
        self.upper = keras.Model(hidden, L.Dense(3, kernel_regularizer="l1")(hidden))
        self.second = keras.optimizers.Adam(0.01, global_clipnorm=0.5)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.upper(self.lower(x))

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        for model, optimizer in ((self.lower, self.optimizer), (self.upper, self.second)):
            gradients = tape.gradient(loss, model.trainable_weights)
            optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        return {"loss": loss}


@pytest.mark.usefixtures("links_between")
def test_steps_of_the_template() -> None:
    def build() -> keras.Model:
        model = TwoOptimizers()
        model(rows(2, 6))
        return model

    bare, parallel = pair(build, TOWERS, weights_on="spread", optimizer=lambda: sgd(), loss="mse")
    assert_same_fit(bare, parallel, data(), epochs=2)
    second = [(bare.second.variables), parallel.template.second.variables]
    for one, other in zip(*second, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-5, atol=2e-6)
    parallel.fit(data(), shuffle=False, verbose=0)
    for optimizer in (parallel.optimizer, parallel.template.second):
        for slot, weight in slots(optimizer):
            assert place(slot) == place(weight)


# --- where they live ----------------------------------------------------------------------------


def test_the_plan_balances_bytes_and_is_the_same_each_time() -> None:
    sizes = [12, 9, 9, 5, 5, 5, 4, 3, 3, 2, 1, 1, 1]
    weights = [keras.Variable(np.zeros(size, "float32")) for size in sizes]
    devices = ["a", "b", "c"]
    plans = [homes.plan(weights, devices, dict.fromkeys(devices, 0)) for _ in range(2)]
    assert plans[0] == plans[1]
    loads = dict.fromkeys(devices, 0)
    for weight, size in zip(weights, sizes, strict=True):
        loads[plans[0][id(weight)]] += size
    assert max(loads.values()) - min(loads.values()) <= 1
    assert homes.plan(weights, ["a"], {"a": 0}) == dict.fromkeys(map(id, weights), "a")


def test_auto_spreads_over_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not homes.wants_spread(["/device:CPU:0", "/device:CPU:1"])
    assert not homes.wants_spread(["/device:GPU:0"])
    assert not homes.wants_spread(["/device:GPU:0", "/device:CPU:0"])
    assert homes.wants_spread(["/device:GPU:0", "/device:GPU:1"])
    far = "/job:worker/replica:0/task:1/device:CPU:0"
    assert homes.wants_spread(["/device:CPU:0", far])
    assert not homes.wants_spread([far])
    template = mlp()
    parallel = pk.DataParallelModel(template, TOWERS)
    assert parallel.request["weights_on"] == "auto"
    assert {place(weight) for weight in template.weights} == {"CPU:0"}
    monkeypatch.setattr(homes, "is_gpu", bool)
    pk.DataParallelModel(template, TOWERS)
    assert {place(weight) for weight in template.weights} == {"CPU:0", "CPU:1", "CPU:2"}


def test_all_on_one_device() -> None:
    bare, parallel = pair(
        regularised, TOWERS, weights_on="cpu:5", optimizer=lambda: sgd(), loss="mse"
    )
    assert_same_fit(bare, parallel, data(), epochs=2)
    everything = [*parallel.template.variables, *parallel.optimizer.variables]
    assert {place(variable) for variable in everything} == {"CPU:5"}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("how", ["build", "fit", "call", "train_on_batch", "unknown shapes"])
def test_templates_without_weights_are_spread_when_they_have_some(how: str) -> None:
    template = keras.Sequential([L.Dense(7, activation="tanh"), L.Dense(3)])
    parallel = pk.DataParallelModel(template, TOWERS, weights_on="spread")
    parallel.compile("adam", "mse")
    x, y = rows(7, 6), rows(7, 3, seed=1)
    if how == "build":
        parallel.build((None, 6))
    elif how == "fit":
        parallel.fit(x, y, batch_size=4, verbose=0)
    elif how == "call":
        parallel(x)
    elif how == "train_on_batch":
        # Its first step makes the weights while it is traced, so they move before the second.
        for _ in range(2):
            parallel.train_on_batch(x, y)
    else:
        parallel.fit(batches((4, 3), x, y), shuffle=False, verbose=0)
    parallel.fit(x, y, batch_size=4, verbose=0)
    assert {place(weight) for weight in template.weights} == {"CPU:0", "CPU:1", "CPU:2"}
    for slot, weight in slots(parallel.optimizer):
        assert place(slot) == place(weight)


def test_a_compiled_template_moves_with_its_state() -> None:
    def trained() -> keras.Model:
        keras.utils.set_random_seed(7)
        model = mlp()
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.3), "mse")
        model.optimizer.exclude_from_weight_decay(var_list=[model.weights[0]])
        model.fit(data(), shuffle=False, verbose=0)
        return model

    bare, template = trained(), trained()
    keys = [id(variable) for variable in template.variables]
    parallel = pk.DataParallelModel(template, TOWERS, weights_on="spread")
    assert [id(variable) for variable in template.variables] == keys
    moved = [v for v in template.optimizer.variables if v.shape.rank]
    assert {place(variable) for variable in moved} == {"CPU:0", "CPU:1", "CPU:2"}
    assert_same_fit(bare, parallel, data(), epochs=2)
    assert int(parallel.optimizer.iterations) == 3 * len(SIZES)
    np.testing.assert_allclose(template.predict(rows(4, 6), verbose=0), template(rows(4, 6)), 1e-5)


def test_weights_that_come_later_are_spread_then() -> None:
    """LoRA and quantisation; what has a home keeps it."""
    template = keras.Sequential([keras.Input((64,)), L.Dense(64), L.Dense(64), L.Dense(3)])
    parallel = pk.DataParallelModel(template, TOWERS, weights_on="spread")
    parallel.compile("adam", "mse")
    x, y = rows(7, 64), rows(7, 3, seed=1)
    parallel.fit(x, y, batch_size=4, verbose=0)
    before = {id(variable): place(variable) for variable in template.variables}
    for layer in template.layers[:2]:
        layer.enable_lora(4)
    parallel.compile("adam", "mse")
    parallel.fit(x, y, batch_size=4, verbose=0)
    for variable in template.variables:
        assert place(variable) == before.get(id(variable), place(variable))
    new = [variable for variable in template.variables if id(variable) not in before]
    assert len({place(variable) for variable in new}) > 1
    expected = template(x)
    np.testing.assert_allclose(parallel.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    for layer in template.layers:
        layer.quantize("int8")
    int8 = [v for v in template.variables if v.dtype == "int8"]
    parallel.compile("adam", "mse")
    found = parallel.predict(x, batch_size=7, verbose=0)
    assert len({place(variable) for variable in int8}) > 1
    assert np.all(np.isfinite(found))


def test_files_know_nothing_of_homes(tmp_path: Path) -> None:
    bare, parallel = pair(mlp, TOWERS, weights_on="spread", optimizer=lambda: sgd(), loss="mse")
    for model in (bare, parallel):
        model.fit(data(), shuffle=False, verbose=0)
    parallel.save(tmp_path / "whole.keras")
    loaded = keras.saving.load_model(tmp_path / "whole.keras")
    assert_same_variables(loaded, parallel)
    parallel.save_weights(tmp_path / "some.weights.h5")
    other = pk.DataParallelModel(mlp(), 2, weights_on="spread")
    other.compile(sgd(), "mse")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "some.weights.h5")
    assert {place(weight) for weight in other.template.weights} == {"CPU:0", "CPU:1"}
    np.testing.assert_allclose(other.predict(rows(5, 6), verbose=0), parallel(rows(5, 6)), 1e-5)
    again = pk.DataParallelModel(loaded, TOWERS, weights_on="spread")
    assert_same_fit(bare, again, data())


def test_configs_carry_it() -> None:
    parallel = pk.DataParallelModel(mlp(), TOWERS, weights_on="spread")
    config = parallel.get_config()
    assert config["weights_on"] == "spread"
    again = pk.DataParallelModel.from_config(config)
    assert {place(weight) for weight in again.template.weights} == {"CPU:0", "CPU:1", "CPU:2"}
    clone = keras.models.clone_model(parallel) if hasattr(parallel, "_functional") else again
    assert clone.template is not parallel.template


def test_a_place_that_is_missing_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    parallel = pk.DataParallelModel(mlp(), TOWERS, weights_on="CPU:5")
    config = {**parallel.get_config(), "weights_on": "GPU:7"}
    again = pk.DataParallelModel.from_config(config)
    assert "weights_on='GPU:7', which this machine does not have: using auto" in caplog.text
    assert again.request["weights_on"] == "auto"


def test_wrong_places() -> None:
    with pytest.raises(TypeError, match=r"Expected `weights_on` to be one of .*weights_on=3"):
        pk.DataParallelModel(mlp(), 2, weights_on=3)
    wrong = r"Expected `weights_on` to be one of \('auto'.*weights_on='spred'.*Devices of this mach"
    with pytest.raises(ValueError, match=wrong):
        pk.DataParallelModel(mlp(), 2, weights_on="spred")
    template = keras.Sequential([keras.Input((3,), batch_size=8), L.Dense(1)])
    with pytest.raises(ValueError, match="fixed batch size"):
        pk.DataParallelModel(template, 2, weights_on="spread")
    assert {place(weight) for weight in template.weights} == {"CPU:0"}


# --- messages -----------------------------------------------------------------------------------


def test_bundles_hold_small_tensors_of_one_dtype() -> None:
    small, large = tf.zeros((4,)), tf.zeros((messages.LARGE // 4,))
    ints = tf.zeros((3,), tf.int32)
    assert messages.bundles([small, large, ints, small, ints, small]) == [[0, 3, 5], [2, 4]]
    assert messages.bundles([small, large, ints]) == []  # nothing to be put together
    nearly = tf.zeros((messages.LARGE // 4 - 1,))
    full = messages.bundles([nearly] * 9)
    assert [len(bundle) for bundle in full] == [4, 4]
    assert messages.bundles([tf.constant("a"), tf.constant("b")]) == []


@pytest.mark.usefixtures("links_between")
def test_carried_tensors_are_what_they_were() -> None:
    nest = {
        "a": [tf.constant(rows(3, 2)), tf.constant([1, 2], tf.int64), tf.constant(2.0)],
        "b": tf.constant([True, False]),
        "c": tf.constant([3], tf.int64),
    }
    places = set()

    def carry() -> Any:
        found = messages.carried(nest, "/device:CPU:1", "/device:CPU:2")
        places.update(tensor.op.device for tensor in tf.nest.flatten(found))
        return found

    found = tf.function(carry, autograph=False)()
    assert places == {"/device:CPU:2"}
    for one, other in zip(tf.nest.flatten(nest), tf.nest.flatten(found), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("links_between")
def test_sums_of_gradients_of_any_kind() -> None:
    sparse = tf.IndexedSlices(tf.constant([[1.0, 2.0]]), tf.constant([1]), tf.constant([3, 2]))
    columns = [
        [tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])],
        [None, None],
        [tf.constant(1.0), tf.constant(5.0)],
        [sparse, sparse],
        [tf.constant([7.0]), None],
        [sparse, tf.ones((3, 2))],
        [tf.constant(1.0, tf.float16), tf.constant(2.0, tf.float16)],
    ]
    homes_ = ["/CPU:2"] * 4 + ["/CPU:1"] * 3
    found = messages.sums(columns, ["/CPU:0", "/CPU:1"], homes_)
    np.testing.assert_array_equal(found[0], [4, 6])
    assert found[1] is None
    assert float(found[2]) == 6
    np.testing.assert_array_equal(tf.convert_to_tensor(found[3]), [[0, 0], [2, 4], [0, 0]])
    np.testing.assert_array_equal(found[4], [7])
    np.testing.assert_array_equal(found[5], [[1, 1], [2, 3], [1, 1]])
    assert found[6].dtype == tf.float16
    assert found[0].device.endswith("CPU:2")
    assert found[6].device.endswith("CPU:1")
