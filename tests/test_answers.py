"""The wrapper answers as its template does."""

import copy
import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, assert_same_variables, mlp, pair, rows

X, Y = rows(10, 6), rows(10, 3, seed=1)


@keras.saving.register_keras_serializable(package="tests")
class Tempered(keras.Model):
    """A model with an attribute that its numbers depend on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(3)
        self.temperature = 1.0

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(x) * self.temperature

    @property
    def broken(self) -> Any:
        raise AttributeError("there is no such vocabulary")

    @property
    def heat(self) -> float:
        return self.temperature

    @heat.setter
    def heat(self, value: float) -> None:
        self.temperature = value


def two_ends() -> keras.Model:
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    outputs = {"s": keras.layers.Dense(2, name="s")(a), "t": keras.layers.Dense(1, name="t")(b)}
    return keras.Model({"a": a, "b": b}, outputs)


@pytest.mark.parametrize("build", [mlp, two_ends])
def test_questions_on_the_graph(build: Any) -> None:
    """C1: https://github.com/keras-team/keras/issues/12694."""
    template = build()
    parallel = pk.DataParallelModel(template, 3)
    names = ["inputs", "outputs", "layers", "weights", "trainable_variables"]
    for name in names if build is mlp else [*names, "output_names"]:
        assert keras.tree.flatten(getattr(parallel, name)) == keras.tree.flatten(
            getattr(template, name)
        )
    for name in ("input_shape", "output_shape", "dtype_policy", "compute_dtype", "variable_dtype"):
        assert getattr(parallel, name) == getattr(template, name), name
    assert parallel.count_params() == template.count_params()
    spec = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype), template.inputs)
    spec = spec[0] if build is mlp else dict(zip("ab", spec, strict=True))
    expected, actual = template.compute_output_spec(spec), parallel.compute_output_spec(spec)
    keras.tree.assert_same_structure(expected, actual)
    for one, other in zip(keras.tree.flatten(expected), keras.tree.flatten(actual), strict=True):
        assert (other.shape, other.dtype) == (one.shape, one.dtype)
    shapes = keras.tree.map_structure(lambda x: x.shape, spec)
    assert parallel.compute_output_shape(shapes) == template.compute_output_shape(shapes)


def test_policies_are_the_templates() -> None:
    policy = keras.DTypePolicy("mixed_float16")
    template = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, dtype=policy)], name="half"
    )
    template.dtype_policy = policy
    parallel = pk.DataParallelModel(template, 2)
    assert (parallel.compute_dtype, parallel.variable_dtype) == ("float16", "float32")
    assert parallel(X).dtype == parallel(keras.Input((6,))).dtype == "float16"


def test_compute_output_spec_traces_no_tower() -> None:
    calls: list[Any] = []

    class Counts(keras.Model):
        def call(self, x: Any) -> Any:
            calls.append(x)
            return x

    template = Counts()
    template.build((None, 3))
    parallel = pk.DataParallelModel(template, 8)
    calls.clear()
    assert parallel.compute_output_spec(keras.KerasTensor((None, 3))).shape == (None, 3)
    assert parallel(keras.Input((3,))).shape == (None, 3)
    assert len(calls) == 2  # the template by itself, once for each question


def test_attributes_are_set_where_they_are_read() -> None:
    """C1: https://github.com/pytorch/pytorch/issues/16885. Never the wrong object's."""
    template = Tempered()
    template(X)
    parallel = pk.DataParallelModel(template, 2)
    expected = template(X)
    parallel.temperature = 2.0
    assert parallel.temperature == template.temperature == 2.0
    np.testing.assert_allclose(parallel(X), 2 * expected, rtol=RTOL, atol=ATOL)
    parallel.note, parallel.counter = "mine", keras.metrics.Mean()
    assert not hasattr(template, "note")
    assert not hasattr(template, "counter")
    own, parallel.dense = template.dense, keras.layers.Dense(1)
    assert template.dense is own


def test_fit_leaves_the_templates_own_history_alone() -> None:
    template = mlp()
    template.compile("sgd", "mse")
    template.fit(X, Y, verbose=0)
    before = template.history
    parallel = pk.DataParallelModel(template, 2)
    parallel.fit(X, Y, verbose=0, epochs=2)
    assert template.history is before
    assert parallel.history.epoch == [0, 1]
    assert parallel.optimizer is template.optimizer


def test_missing_names_tell_why() -> None:
    parallel = pk.DataParallelModel(Tempered(), 2)
    with pytest.raises(AttributeError, match=r"no attribute 'broken'") as caught:
        _ = parallel.broken
    assert "there is no such vocabulary" in str(caught.value.__cause__)
    assert not hasattr(parallel, "nothing")
    assert getattr(parallel, "nothing", 5) == 5


@pytest.mark.sweep(1)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(how: Any) -> None:
    _, parallel = pair(mlp, 2, optimizer=lambda: keras.optimizers.Adam(0.01), loss="mse")
    parallel.fit(X, Y, batch_size=7, verbose=0)
    again = how(parallel)
    assert type(again) is pk.DataParallelModel
    assert again.devices == parallel.devices
    for one, other in zip(parallel.variables, again.variables, strict=True):
        np.testing.assert_array_equal(other.numpy(), one.numpy())
    assert again.template is not parallel.template
    assert again.optimizer is again.template.optimizer
    for model in (parallel, again):
        model.fit(X, Y, batch_size=7, verbose=0, shuffle=False)
    assert_same_variables(parallel.template, again)


@pytest.mark.parametrize("before", [True, False])
def test_trainable_before_and_after_wrapping(before: bool) -> None:
    """C4: https://github.com/keras-team/keras/issues/9198."""
    template = mlp()
    if before:
        template.layers[0].trainable = False
    parallel = pk.DataParallelModel(template, 2)
    if not before:
        parallel.layers[0].trainable = False
    parallel.compile("sgd", "mse")
    old = parallel.get_weights()
    parallel.fit(X, Y, verbose=0)
    same = [np.array_equal(one, other) for one, other in zip(old, parallel.get_weights())]  # noqa: B905
    assert same == [True, True, False, False]
    parallel.trainable = False
    assert not any(layer.trainable for layer in template.layers)


def test_plots(tmp_path: Path) -> None:
    """The wrapper is one box, as any subclassed model; its template shows the layers."""
    parallel = pk.DataParallelModel(mlp(), 2, name="on_two")
    assert "on_two" in keras.utils.model_to_dot(parallel).to_string()
    assert (
        keras.utils.model_to_dot(parallel.template, show_layer_names=True)
        .to_string()
        .count("dense")
    )
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, parallel(inputs))
    assert "on_two" in keras.utils.model_to_dot(outer, show_layer_names=True).to_string()


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
def test_quantised_models_predict_with_what_they_are_now() -> None:
    bare, parallel = pair(mlp, 3, optimizer="sgd", loss="mse")
    exact = parallel.predict(X, verbose=0)
    for model in (bare, parallel):
        model.quantize("int8")
    assert "int8" in {variable.dtype for variable in parallel.variables}
    actual = parallel.predict(X, batch_size=7, verbose=0)
    np.testing.assert_allclose(actual, bare.predict(X, verbose=0), rtol=RTOL, atol=ATOL)
    assert not np.array_equal(actual, exact)


def test_low_rank_updates_are_trained_and_saved(tmp_path: Path) -> None:
    """Also after a fit without them, which the towers have traced."""
    bare, parallel = pair(mlp, 3, optimizer="sgd", loss="mse")
    for model in (bare, parallel):
        model.fit(X, Y, batch_size=7, verbose=0, shuffle=False)
        keras.utils.set_random_seed(3)
        model.get_layer(index=0).enable_lora(2)
        model.compile(keras.optimizers.SGD(0.1), "mse")
    frozen = parallel.get_layer(index=0).variables[0].numpy()
    before = [v.numpy() for v in parallel.trainable_variables]
    assert_same_fit(bare, parallel, X, Y, batch_size=7, epochs=3)
    np.testing.assert_array_equal(parallel.get_layer(index=0).variables[0].numpy(), frozen)
    for old, new in zip(before, parallel.trainable_variables, strict=True):
        assert not np.array_equal(old, new.numpy()), new.path
    parallel.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(X), parallel(X), rtol=RTOL, atol=ATOL)


class OwnLoss(keras.Model):
    """Methods of Keras' that users override, and call in loops of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.last(self.first(x))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, **kwargs: Any) -> Any:
        loss = keras.ops.mean(keras.ops.abs(y - y_pred))
        if loss > 0.1:
            loss = 3 * loss
        return loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return {"own": keras.ops.sum(y_pred)}


class OldLoss(OwnLoss):
    """Written before Keras 3.3."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        return super().compute_loss(x, y, y_pred)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("kind", [OwnLoss, OldLoss, keras.Model])
def test_loops_of_the_users_ask_for_losses_and_metrics(kind: Any, traced: bool) -> None:
    def build() -> keras.Model:
        template = mlp() if kind is keras.Model else kind()
        template(X)
        return template

    bare, parallel = pair(build, 3, optimizer="sgd", loss="mse", metrics=["mae"])

    def step(model: keras.Model) -> Any:
        outputs = model(X, training=True)
        loss = model.compute_loss(x=X, y=Y, y_pred=outputs, sample_weight=None)
        return loss, model.compute_metrics(X, Y, outputs)

    # A function that was traced before may make no more variables.
    runs = [tf.function(step) if traced else step for _ in range(2)]
    expected, found = (run(model) for run, model in zip(runs, (bare, parallel), strict=True))
    assert found[1].keys() == expected[1].keys()
    values = [tf.nest.flatten(each) for each in (found, expected)]
    np.testing.assert_allclose(*values, rtol=RTOL, atol=ATOL)


class OnlyLast(OwnLoss):
    """Says itself what is trained."""

    compute_loss, compute_metrics = keras.Model.compute_loss, keras.Model.compute_metrics

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self.last.trainable_weights

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return self.trainable_weights


@pytest.mark.parametrize("loss_on", ["merged", "towers"])
def test_templates_say_what_is_trained(loss_on: str) -> None:
    def build() -> keras.Model:
        template = OnlyLast()
        template(X)
        return template

    bare, parallel = pair(build, 3, loss_on=loss_on, optimizer="adam", loss="mse")
    assert len(parallel.trainable_variables) == 2
    first = [v.numpy() for v in parallel.first.variables]
    assert_same_fit(bare, parallel, X, Y, batch_size=7, epochs=2)
    for old, new in zip(first, parallel.first.variables, strict=True):
        np.testing.assert_array_equal(new.numpy(), old)


def test_the_architecture_is_that_of_one_device() -> None:
    template = mlp()
    parallel = pk.DataParallelModel(template, 3)
    assert parallel.to_json() == template.to_json()
    assert type(keras.models.model_from_json(parallel.to_json())) is type(template)
