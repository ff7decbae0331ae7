"""Faults found by running real programs bare and wrapped: what Keras' own loops and calls do.

The id above each test is that of the kind of fault.
"""

import math
import re
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_fit, assert_same_variables, batches, pair, rows
from tests.versions import since

TOWERS = [1, 3]


def same(actual: Any, expected: Any) -> None:
    """Nests of numbers are equal."""
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=RTOL, atol=ATOL)


class Phases(keras.Model):
    """Its numbers tell what `training` was."""

    def __init__(self, inner: Any = None) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(2) if inner is None else inner

    def told(self, x: Any, training: Any) -> Any:
        sign = {None: 3.0, True: 1.0, False: -1.0}[training]
        return sign * self.inner(x)


class TrainingByDefault(Phases):
    def call(self, x: Any, training: Any = True) -> Any:
        return self.told(x, training)


class KeywordOnly(Phases):
    def call(self, x: Any, *, training: Any = False) -> Any:
        return self.told(x, training)


class NoDefault(Phases):
    def call(self, x: Any, training: Any = None) -> Any:
        return self.told(x, training)


class NoTraining(Phases):
    def call(self, x: Any) -> Any:
        return self.told(x, None)


class SecondByDefault(keras.Model):
    """Other arguments beside it, some of which are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True
        self.dense = keras.layers.Dense(2)

    def call(
        self, x: Any, flip: bool = False, training: Any = True, mask: Any = None, by: float = 1.0
    ) -> Any:
        y = self.dense(x) * (-1.0 if flip else 1.0) * by + (1.0 if training else 0.0)
        return y if mask is None else y * tf.cast(mask, y.dtype)[:, None]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("kind", [TrainingByDefault, KeywordOnly, NoDefault, NoTraining])
def test_training_is_what_it_is_on_one_device(kind: Any, towers: int) -> None:
    """X11: an argument that was not given must not hide the default of the template's call."""
    x = rows(7, 3)
    bare, parallel = pair(kind, towers, optimizer="sgd", loss="mse")
    bare(x)
    parallel(x)
    for given in ({}, {"training": True}, {"training": False}):
        same(parallel(x, **given), bare(x, **given))

    outer = NoDefault(bare), NoDefault(parallel)
    for given in ({}, {"training": True}, {"training": False}):
        same(outer[1](x, **given), outer[0](x, **given))

    y = rows(7, 2)
    assert_same_fit(bare, parallel, x, y, batch_size=4, epochs=2)
    same(parallel.predict(x, verbose=0), bare.predict(x, verbose=0))
    same(parallel.evaluate(x, y, verbose=0), bare.evaluate(x, y, verbose=0))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("eager", [False, True])
def test_layers_of_a_model_that_takes_no_training(loss_on: str, eager: bool) -> None:
    """X11: Keras' steps give `training` only to models that take it."""

    class Outer(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = keras.Sequential(
                [
                    keras.layers.Dropout(0.5),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dense(2),
                ]
            )

        def call(self, x: Any) -> Any:
            return self.net(x)

    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(Outer, 3, loss_on=loss_on, optimizer="sgd", loss="mse", run_eagerly=eager)
    assert_same_fit(bare, parallel, x, y, batch_size=4, epochs=2, validation_data=(x, y))


@pytest.mark.parametrize("towers", TOWERS)
def test_arguments_that_are_no_tensors(towers: int) -> None:
    """X11: flags and numbers given by name, with defaults between them."""
    x = rows(7, 3)
    template = SecondByDefault()
    template(x)
    parallel = pk.DataParallelModel(template, towers)
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    for given in (
        {},
        {"flip": True},
        {"by": 3.0},
        {"flip": True, "by": 2.0, "training": False},
        {"mask": mask, "flip": True},
        {"mask": mask, "training": False},
    ):
        same(parallel(x, **given), template(x, **given))


class OptionalInput(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x: Any) -> Any:
        y = self.dense(x["a"])
        return y if x["b"] is None else y + x["b"]


class Pieces(keras.utils.PyDataset):
    def __init__(self, x: Any, y: Any, size: int) -> None:
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.size)

    def __getitem__(self, index: int) -> Any:
        cut = slice(index * self.size, (index + 1) * self.size)
        return {"a": self.x[cut], "b": None}, self.y[cut]


def dataset_without(x: Any, y: Any, size: int) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
    return data.map(lambda x, y: ({"a": x, "b": None}, y))


@since("3.9", "an optional input that is left out fails, on one device too")
@pytest.mark.sweep(1)
@pytest.mark.parametrize("build", [True, False])
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("source", ["arrays", "dataset"])
def test_optional_inputs_that_are_left_out(source: str, loss_on: str, build: bool) -> None:
    """X29: a `None` among the inputs is no input."""
    x, y = rows(7, 3), rows(7, 2)

    def data() -> Any:
        if source == "arrays":
            return {"x": {"a": x, "b": None}, "y": y, "batch_size": 4}
        return {"x": (dataset_without if source == "dataset" else Pieces)(x, y, 4)}

    def built() -> keras.Model:
        model = OptionalInput()
        if build:
            model({"a": x, "b": None})
        return model

    bare, parallel = pair(built, 3, loss_on=loss_on, optimizer="adam", loss="mse", metrics=["mae"])
    histories = [
        m.fit(**data(), epochs=2, shuffle=False, verbose=0).history for m in (bare, parallel)
    ]
    same(histories[1], histories[0])
    same(parallel.evaluate(**data(), verbose=0), bare.evaluate(**data(), verbose=0))
    assert_same_variables(bare, parallel)
    inputs = {"a": x, "b": None}
    same(parallel.predict(inputs, verbose=0), bare.predict(inputs, verbose=0))
    same(parallel.train_on_batch(inputs, y), bare.train_on_batch(inputs, y))
    full = {"a": x, "b": rows(7, 2)}
    same(parallel.predict(full, verbose=0), bare.predict(full, verbose=0))


@pytest.mark.parametrize("towers", TOWERS)
def test_predict_before_the_template_has_weights(towers: int) -> None:
    """X29: found beside it, the first thing done with a model may be `predict`."""
    x = rows(7, 3)
    for build in (NoDefault, lambda: keras.Sequential([keras.layers.Dense(2)])):
        bare, parallel = pair(build, towers)
        keras.utils.set_random_seed(3)
        expected = bare.predict(x, batch_size=4, verbose=0)
        keras.utils.set_random_seed(3)
        same(parallel.predict(x, batch_size=4, verbose=0), expected)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, name="opt"),
    "adam": lambda: keras.optimizers.Adam(name="opt"),
    "nadam": lambda: keras.optimizers.Nadam(name="opt"),
    "adafactor": lambda: keras.optimizers.Adafactor(name="opt"),
    "averaged": lambda: keras.optimizers.RMSprop(use_ema=True, centered=True, name="opt"),
    "accumulating": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2, name="opt"),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Lion(name="inner"), name="opt"
    ),
}


def layout(path: Path) -> dict[str, Any]:
    """What is in a legacy file, by path."""
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.sweep(4)
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_legacy_files_are_laid_out_as_those_of_one_device(
    optimizer: str, towers: int, tmp_path: Path
) -> None:
    """X25: a slot that is made early has the path that it has when a step makes it."""

    def build() -> keras.Model:
        layers = [keras.Input((3,)), keras.layers.Dense(2, name="d")]
        return keras.Sequential(layers, name="net")

    bare, parallel = pair(
        build, towers, optimizer=OPTIMIZERS[optimizer], loss=keras.losses.MeanSquaredError()
    )
    for model in (bare, parallel):
        model.fit(rows(6, 3), rows(6, 2), batch_size=4, shuffle=False, verbose=0)

    def paths(model: keras.Model) -> list[str]:
        # Nadam leaves one name to Keras, which counts them up.
        return [
            re.sub(r"/variable(_\d+)?$", "/variable", v.path) for v in model.optimizer.variables
        ]

    assert paths(parallel) == paths(bare)
    if optimizer == "adafactor":
        return  # Keras gives two of its slots one name and cannot save them so.
    bare.save(tmp_path / "bare.h5")
    parallel.save(tmp_path / "parallel.h5")
    expected, actual = layout(tmp_path / "bare.h5"), layout(tmp_path / "parallel.h5")
    assert len(actual) == len(expected)
    for name in set(expected) & set(actual):
        np.testing.assert_allclose(actual[name], expected[name], rtol=RTOL, atol=ATOL, err_msg=name)
    assert not [name for name in set(expected) ^ set(actual) if "/variable" not in name]


# Keras says so where it did not know how much data there is.
@pytest.mark.sweep(1)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_end_of_the_data_is_no_step(jit: bool, steps: int) -> None:
    """X28: with XLA, a step that finds no data must not have counted itself."""
    x, y = rows(14, 3), rows(14, 2)

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])

    def generate() -> Any:
        for start in range(0, 14, 2):
            yield x[start : start + 2], y[start : start + 2]

    signature = (tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2)))
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    bare, parallel = pair(
        build,
        3,
        optimizer=lambda: keras.optimizers.Adam(schedule),
        loss="mse",
        jit_compile=jit,
        steps_per_execution=steps,
    )
    for model in (bare, parallel):
        for _ in range(2):
            data = tf.data.Dataset.from_generator(generate, output_signature=signature)
            model.fit(data, epochs=2, shuffle=False, verbose=0)
    assert_same_variables(bare, parallel)
    if jit:
        assert int(parallel.optimizer.iterations) == 28


class CountsItself(keras.Model):
    """Metrics of its own, updated in `call`: fed with a mean, a sum, and values with rows."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)
        self.size = keras.metrics.Mean(name="size")
        self.total = keras.metrics.Sum(name="total")
        self.parts = {"wide": keras.metrics.MeanMetricWrapper(wide, name="wide")}

    def call(self, x: Any) -> Any:
        y = self.dense(x)
        self.size.update_state(tf.reduce_mean(tf.abs(y)))
        self.total.update_state(y)
        self.parts["wide"].update_state(x[:, :2], y)
        return y


def wide(y_true: Any, y_pred: Any) -> Any:
    return tf.reduce_max(tf.abs(y_true - y_pred), axis=-1)


class CountsInItsLoss(CountsItself):
    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> Any:
        del x, sample_weight, training
        self.size.update_state(tf.reduce_mean(tf.abs(y_pred)))
        return tf.reduce_mean(tf.square(y - y_pred))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", [CountsItself, CountsInItsLoss])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("loss_on", ["auto", "merged"])
@pytest.mark.parametrize("towers", TOWERS)
def test_metrics_that_the_template_holds(towers: int, loss_on: str, eager: bool, kind: Any) -> None:
    """X27: in the History, started anew each epoch, in evaluate, counted once."""
    x, y = rows(7, 3), rows(7, 2)
    bare, parallel = pair(
        kind, towers, loss_on=loss_on, optimizer="sgd", loss="mse", metrics=["mae"],
        run_eagerly=eager,
    )  # fmt: skip
    for _ in range(2):
        assert_same_fit(bare, parallel, x, y, batch_size=3, epochs=2, validation_data=(x, y))
    same(parallel.evaluate(x, y, verbose=0), bare.evaluate(x, y, verbose=0))
    same(parallel.train_on_batch(x, y), bare.train_on_batch(x, y))
    assert parallel.metrics_names == bare.metrics_names
    names = [[v.path.rpartition("/")[2] for v in m.metrics_variables] for m in (bare, parallel)]
    assert names[0] == names[1]
    for one, other in zip(bare.metrics, parallel.metrics, strict=True):
        same([v.numpy() for v in other.variables], [v.numpy() for v in one.variables])
    assert [id(m) for m in parallel.metrics] == [id(m) for m in parallel.template.metrics]


class LooksAtNumbers(keras.layers.Layer):
    """Runs only eagerly: a loop over rows, and NumPy in between."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x: Any) -> Any:
        scales = np.tanh(np.asarray(x))[:, 0]
        rows = [self.dense(row[None]) * scale for row, scale in zip(x, scales, strict=True)]
        return tf.concat(rows, 0)


class EagerSteps(keras.Model):
    """A step of its own around a model that is not built yet and cannot be built by symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.top = LooksAtNumbers(), keras.layers.Dense(2)

    def call(self, x: Any, training: Any = None) -> Any:
        del training
        return self.top(self.looks(x))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class EagerCall(EagerSteps):
    train_step = keras.Model.train_step


@pytest.mark.filterwarnings("ignore:.*unbuilt state")  # Keras tried symbols
@pytest.mark.parametrize(
    "kind",
    [
        EagerSteps,
        EagerCall,
        lambda: keras.Sequential([LooksAtNumbers(), keras.layers.Dense(2)]),
    ],
)
def test_unbuilt_models_that_only_run_eagerly(kind: Any) -> None:
    """X20: from a data set too, whose specs no such model can be built from."""
    x, y = rows(7, 3), rows(7, 2)
    for data in ((x, y), (batches([4, 3], x, y),)):
        bare, parallel = pair(kind, 3, optimizer="sgd", loss="mse", run_eagerly=True)
        assert_same_fit(bare, parallel, *data, batch_size=4 if len(data) == 2 else None)


def test_a_sequential_that_a_call_builds_takes_any_number_of_rows() -> None:
    """X20: it can be wrapped again."""
    template = keras.Sequential([keras.layers.Dense(2)])
    pk.DataParallelModel(template, 3)(rows(7, 3))
    assert pk.DataParallelModel(template, 2)(rows(4, 3)).shape == (4, 2)
