"""Faults found by running real programs bare and wrapped: templates with loops of their own.

The id above each test is that of the kind of fault.
"""

import functools
import types
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.parity import ATOL, RTOL, assert_same_variables, pair, rows

TOWERS = [1, 3]
WORDS = ("a", "bad", "good", "film", "is", "this")


def same(actual: Any, expected: Any) -> None:
    """Nests of numbers are equal."""
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=RTOL, atol=ATOL)


def net() -> list[Any]:
    return [keras.layers.Dense(5, "tanh"), keras.layers.Dropout(0.0), keras.layers.Dense(1)]


class Scaled(keras.Sequential):
    """Prepares what it is given in each of Keras' loops."""

    def fit(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        if "validation_data" in kwargs:
            first, second = kwargs["validation_data"]
            kwargs["validation_data"] = first / 255.0, second
        return super().fit(x / 255.0, y, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        ready = kwargs.get("_use_cached_eval_dataset", False)
        return super().evaluate(x if ready else x / 255.0, y, **kwargs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return super().predict(x / 255.0, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
        return super().train_on_batch(x / 255.0, y, **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
        return super().test_on_batch(x / 255.0, y, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        return super().predict_on_batch(x / 255.0)


class ByMixin:
    """Is no model itself."""

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return 1000.0 + super().predict(x / 255.0, **kwargs)  # type: ignore[misc]


class Mixed(ByMixin, keras.Sequential):
    pass


class NamesItsBase(keras.Sequential):
    def fit(self, x: Any, y: Any, *, scale: float = 1.0, **kwargs: Any) -> Any:
        return keras.Model.fit(self, x * scale, y, **kwargs)


class Renames(keras.Sequential):
    """What the steps say, and when metrics begin anew."""

    def get_metrics_result(self) -> Any:
        return {f"my_{name}": value for name, value in super().get_metrics_result().items()}

    def reset_metrics(self) -> None:
        self.resets = getattr(self, "resets", 0) + 1
        super().reset_metrics()


class WrapsFunctions(keras.Sequential):
    """Makes other functions of the steps: one counts on top, one is made anew."""

    def make_train_function(self, force: bool = False) -> Any:
        if self.train_function is None or force:
            super().make_train_function(force)
            inner = self.train_function
            self.seen = 0

            def function(iterator: Any) -> Any:
                self.seen += 1
                return inner(iterator)

            self.train_function = function
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        if self.test_function is None or force:
            step = tf.function(lambda data: self.test_step(data))
            self.test_function = lambda iterator: step(next(iterator))
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        if self.predict_function is None or force:
            step = tf.function(lambda data: self.predict_step(data) * 2.0)
            self.predict_function = lambda data: step(data[0])
        return self.predict_function


class OwnLoop(keras.Sequential):
    """Does not call Keras' loop at all, and says other things."""

    def fit(self, data: Any, times: int = 1) -> list[float]:
        losses = []
        for _ in range(times):
            for x, y in data:
                losses.append(float(self.train_on_batch(x, y, return_dict=True)["loss"]))
        return losses


class OwnStepToo(Scaled):
    """A step of its own besides."""

    def train_step(self, data: Any) -> Any:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred) + tf.reduce_mean(tf.abs(y_pred))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {**self.compute_metrics(x, y, y_pred), "loss": loss}


X, Y = 100 + 60 * rows(7, 3), rows(7, 1, seed=1)


def history(model: Any, *args: Any, **kwargs: Any) -> dict[str, list[float]]:
    keras.utils.set_random_seed(4)
    return model.fit(*args, batch_size=3, epochs=2, shuffle=False, verbose=0, **kwargs).history


KINDS = (Scaled, Mixed, NamesItsBase, Renames, WrapsFunctions, OwnStepToo, keras.Sequential)
CASES = [
    *[(3, kind, {}) for kind in KINDS],
    *[(1, kind, {}) for kind in (Scaled, Renames)],
    *[(3, kind, {"run_eagerly": True}) for kind in (Scaled, Renames, WrapsFunctions)],
    (3, Scaled, {"jit_compile": True}),
    (3, Renames, {"steps_per_execution": 2}),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("towers", "kind", "how"), CASES)
def test_loops_of_the_template(towers: int, kind: Any, how: dict[str, Any]) -> None:
    """X3: what a template does in its loops is done once, and its steps are the parallel ones."""
    bare, parallel = pair(
        lambda: kind([keras.Input((3,)), *net()]), towers,
        optimizer="adam", loss="mse", metrics=["mae", "accuracy"], **how,
    )  # fmt: skip
    more = {"scale": 0.5} if kind is NamesItsBase else {}
    for _ in range(2):
        same(history(parallel, X, Y, validation_data=(X, Y), **more),
             history(bare, X, Y, validation_data=(X, Y), **more))  # fmt: skip
    assert_same_variables(bare, parallel)
    for ask in (
        lambda m: m.evaluate(X, Y, verbose=0),
        lambda m: m.predict(X, batch_size=4, verbose=0),
        lambda m: m.train_on_batch(X, Y),
        lambda m: m.test_on_batch(X, Y, return_dict=True),
        lambda m: m.predict_on_batch(X),
        lambda m: {name: float(value) for name, value in m.get_metrics_result().items()},
        lambda m: [getattr(m, "seen", 0), getattr(m, "resets", 0)],
        lambda m: m.history.history,
    ):
        same(ask(parallel), ask(bare))
    assert parallel.template.jit_compile == bare.jit_compile
    left = [name for name in ("train_step", "save") if name in vars(parallel.template)]
    assert left == []
    # By itself, the template trains on one device, with functions of its own.
    same(history(parallel.template, X, Y, **more), history(bare, X, Y, **more))


def test_steps_run_on_all_towers() -> None:
    """X3: rows of one step are seen on several devices."""
    seen: list[int] = []

    class Watches(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            seen.append(x.shape[0])
            return x

    model = Scaled([keras.Input((3,)), Watches(), keras.layers.Dense(1)])
    parallel = pk.DataParallelModel(model, 3)
    parallel.compile("sgd", "mse", run_eagerly=True)
    seen.clear()
    parallel.fit(X, Y, batch_size=7, verbose=0)
    assert seen == [3, 2, 2]


@pytest.mark.parametrize("towers", TOWERS)
def test_a_loop_that_is_not_keras(towers: int) -> None:
    """X3: with other arguments and another result."""
    data = [(X[:4] / 255, Y[:4]), (X[4:] / 255, Y[4:])]
    bare, parallel = pair(
        lambda: OwnLoop([keras.Input((3,)), *net()]), towers, optimizer="sgd", loss="mse"
    )
    same(parallel.fit(data, times=2), bare.fit(data, times=2))
    same(parallel.fit(data=data), bare.fit(data=data))
    assert_same_variables(bare, parallel)


@pytest.mark.parametrize("towers", TOWERS)
def test_methods_set_on_the_instance(towers: int) -> None:
    """X3: a function in the place of a method, also one that keeps Keras' own."""

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), *net()])
        keras_predict = model.predict
        model.predict = lambda x, **kwargs: keras_predict(x / 255.0, **kwargs)
        model.fit = functools.partial(keras.Model.fit, model, class_weight={0: 1.0, 1: 3.0})

        def train_step(self: Any, data: Any) -> Any:
            return {"loss": 2.0 * keras.Model.train_step(self, data)["loss"]}

        model.train_step = types.MethodType(train_step, model)
        return model

    labels = np.array([0, 1, 1, 0, 1, 0, 0], "float32")[:, None]
    bare, parallel = pair(build, towers, optimizer="sgd", loss="mse")
    x = X / 255
    same(history(parallel, x, labels), history(bare, x, labels))
    same(parallel.predict(X, verbose=0), bare.predict(X, verbose=0))
    assert_same_variables(bare, parallel)


class StopsAfter(keras.callbacks.Callback):
    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches, self.predicted = batches, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch + 1 == self.batches:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.predicted.append(self.model.predict(X, verbose=0))


@pytest.mark.parametrize("towers", TOWERS)
def test_callbacks_see_a_model_that_works(towers: int, tmp_path: Path) -> None:
    """X3: files, early stops, learning rates, predictions in the middle of `fit`."""
    bare, parallel = pair(
        lambda: Scaled([keras.Input((3,)), *net()]), towers, optimizer="sgd", loss="mse"
    )
    stops = []
    for model, name in ((bare, "bare"), (parallel, "parallel")):
        stops.append(StopsAfter(2))
        callbacks = [
            keras.callbacks.ModelCheckpoint(
                tmp_path / f"{name}.weights.h5", save_weights_only=True
            ),
            keras.callbacks.ModelCheckpoint(tmp_path / f"{name}.keras"),
            keras.callbacks.BackupAndRestore(tmp_path / name),
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch)),
            keras.callbacks.EarlyStopping("loss", restore_best_weights=True),
            stops[-1],
        ]
        result = model.fit(
            X, Y, batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=callbacks
        )
        assert result is model.history
        assert len(result.epoch) == 1
        assert model.stop_training
    same(stops[1].predicted, stops[0].predicted)
    assert_same_variables(bare, parallel)
    with keras.saving.custom_object_scope({"Scaled": Scaled}):
        loaded = keras.saving.load_model(tmp_path / "parallel.keras")
    assert_same_variables(loaded, parallel)
    np.testing.assert_allclose(
        float(loaded.optimizer.learning_rate), float(bare.optimizer.learning_rate)
    )


def test_a_loop_is_stopped_through_the_wrapper() -> None:
    """X3: by who only knows the wrapper."""
    parallel = pk.DataParallelModel(Scaled([keras.Input((3,)), *net()]), 2)
    parallel.compile("sgd", "mse")

    def stop(batch: int, logs: Any) -> None:
        parallel.stop_training = True

    stops = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    parallel.fit(X, Y, batch_size=1, epochs=5, verbose=0, callbacks=[stops])
    assert len(parallel.history.epoch) == 1
    assert int(parallel.optimizer.iterations) == 1


class Preprocessor(keras.layers.Layer):
    """From texts to numbers of words, as the preprocessors of KerasHub."""

    def __init__(self, length: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.lookup = keras.layers.StringLookup(vocabulary=list(WORDS), mask_token="")

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        words = tf.strings.split(tf.convert_to_tensor(x))
        ids = self.lookup(words.to_tensor("", shape=[None, self.length]))
        inputs = {"token_ids": ids, "padding_mask": ids > 0}
        return keras.utils.pack_x_y_sample_weight(inputs, y, sample_weight)


class PipelineModel(keras.Model):
    """Prepares data in its loops, as the class of that name in KerasHub does."""

    def preprocess_samples(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        if self.preprocessor is None:
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        return self.preprocessor(x, y=y, sample_weight=sample_weight)

    def prepared(self, x: Any, y: Any, sample_weight: Any, batch_size: int | None) -> Any:
        if not isinstance(x, tf.data.Dataset):
            packed = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            x = tf.data.Dataset.from_tensor_slices(packed).batch(batch_size or 32)
        return x.map(self.preprocess_samples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(getattr(leaf, "dtype", None) == "string" for leaf in keras.tree.flatten(args)):
            raise ValueError("received string input")
        return super().__call__(*args, **kwargs)

    def fit(
        self, x: Any = None, y: Any = None, batch_size: Any = None, sample_weight: Any = None,
        validation_data: Any = None, validation_split: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if validation_data is not None:
            if not isinstance(validation_data, tf.data.Dataset):
                unpacked = keras.utils.unpack_x_y_sample_weight(validation_data)
                validation_data = self.prepared(*unpacked, batch_size)
            else:
                validation_data = validation_data.map(self.preprocess_samples)
        x = self.prepared(x, y, sample_weight, batch_size)
        return super().fit(
            x=x, y=None, batch_size=None, sample_weight=None, validation_data=validation_data,
            **kwargs,
        )  # fmt: skip

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: Any = None, sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if kwargs.get("_use_cached_eval_dataset", False):
            return super().evaluate(x=x, y=y, batch_size=batch_size, **kwargs)
        x = self.prepared(x, y, sample_weight, batch_size)
        return super().evaluate(x=x, y=None, batch_size=None, **kwargs)

    def predict(self, x: Any = None, batch_size: Any = None, **kwargs: Any) -> Any:
        return super().predict(
            x=self.prepared(x, None, None, batch_size), batch_size=None, **kwargs
        )

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kw: Any) -> Any:
        data = self.preprocess_samples(x, y, sample_weight)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return super().train_on_batch(x=x, y=y, sample_weight=sample_weight, **kw)

    def predict_on_batch(self, x: Any, **kwargs: Any) -> Any:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(self.preprocess_samples(x))
        return super().predict_on_batch(x=x, **kwargs)


class Task(PipelineModel):
    """A functional model around a backbone, compiled when it is made."""

    def __init__(self, outputs: int, causal: bool) -> None:
        inputs = {
            "token_ids": keras.Input((None,), dtype="int64", name="token_ids"),
            "padding_mask": keras.Input((None,), dtype="bool", name="padding_mask"),
        }
        h = keras.layers.Embedding(len(WORDS) + 2, 5)(inputs["token_ids"])
        h = h * keras.ops.expand_dims(keras.ops.cast(inputs["padding_mask"], "float32"), -1)
        if causal:
            h = keras.layers.GRU(6, return_sequences=True)(h)
        else:
            h = keras.layers.GlobalAveragePooling1D()(h)
        super().__init__(inputs, keras.layers.Dense(outputs)(h))
        self.preprocessor = Preprocessor()
        self.compile()


class Classifier(Task):
    def __init__(self) -> None:
        super().__init__(2, causal=False)

    def compile(
        self, optimizer: Any = "auto", loss: Any = "auto", *, metrics: Any = "auto", **kw: Any
    ) -> None:
        optimizer = keras.optimizers.Adam(0.01) if optimizer == "auto" else optimizer
        loss = (
            keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss == "auto" else loss
        )
        metrics = [keras.metrics.SparseCategoricalAccuracy()] if metrics == "auto" else metrics
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kw)


class CausalLM(Task):
    def __init__(self) -> None:
        super().__init__(len(WORDS) + 2, causal=True)

    def compile(
        self, optimizer: Any = "auto", loss: Any = "auto", *, sampler: str = "greedy", **kw: Any
    ) -> None:
        optimizer = keras.optimizers.Adam(0.01) if optimizer == "auto" else optimizer
        loss = (
            keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss == "auto" else loss
        )
        super().compile(optimizer=optimizer, loss=loss, **kw)
        self.sampler, self.generate_function = sampler, None

    def preprocess_samples(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        inputs = self.preprocessor(x)
        return keras.utils.pack_x_y_sample_weight(inputs, inputs["token_ids"], sample_weight)

    def generate_step(self, inputs: Any, steps: int = 2) -> Any:
        ids = inputs["token_ids"]
        for _ in range(steps):
            logits = self({"token_ids": ids, "padding_mask": ids > 0})
            best = tf.argmax if self.sampler == "greedy" else tf.argmin
            ids = tf.concat([ids, best(logits[:, -1], -1)[:, None]], 1)
        return ids

    def make_generate_function(self) -> Any:
        if self.generate_function is None:
            self.generate_function = tf.function(self.generate_step, jit_compile=self.jit_compile)
        return self.generate_function

    def generate(self, texts: Any) -> Any:
        return self.make_generate_function()(self.preprocessor(texts)).numpy()


TEXTS = np.array(
    ["this film is good", "a bad film", "good", "is this a film", "bad bad bad bad", "film a", "a"]
)
LABELS = np.array([1, 0, 1, 0, 0, 1, 1])


def texts(size: int) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((TEXTS, LABELS)).batch(size)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("kind", [Classifier, CausalLM])
def test_tasks_as_those_of_keras_hub(kind: Any, anew: bool, towers: int, tmp_path: Path) -> None:
    """X3: `fit` on texts, datasets of texts, defaults in `compile`, `generate`."""
    models = []
    for wrap in (False, True):
        keras.utils.set_random_seed(5)
        models.append(pk.DataParallelModel(kind(), towers) if wrap else kind())
    bare, parallel = models
    for model in models:
        if anew:
            more = {"sampler": "worst"} if kind is CausalLM else {"metrics": ["accuracy"]}
            model.compile(optimizer=keras.optimizers.SGD(0.1), **more)

    def all_of_it(model: Any) -> list[Any]:
        keras.utils.set_random_seed(2)
        quiet, fitting = {"verbose": 0}, {"verbose": 0, "shuffle": False}
        validation = {"validation_data": (TEXTS[:5], LABELS[:5])}
        labels = () if kind is CausalLM else (LABELS,)
        results = [
            model.fit(TEXTS, LABELS, batch_size=4, epochs=2, **validation, **fitting).history,
            model.fit(texts(5), validation_data=texts(2), **fitting).history,
            model.evaluate(TEXTS, LABELS, batch_size=3, **quiet),
            model.evaluate(texts(4), **quiet),
            model.predict(TEXTS, batch_size=3, **quiet),
            model.train_on_batch(TEXTS, *labels),
            model.predict_on_batch(TEXTS[:2]),
        ]
        prepared = model.preprocess_samples(TEXTS)
        inputs = keras.utils.unpack_x_y_sample_weight(prepared)[0]
        results.append(model(inputs).numpy())
        if kind is CausalLM:
            results.append(model.generate(TEXTS[:3]))
            model.compile(sampler="worst")
            results.append(model.generate(TEXTS[:3]))
            results.append(model.fit(TEXTS, batch_size=4, **fitting).history)
        return results

    same(all_of_it(parallel), all_of_it(bare))
    assert_same_variables(bare, parallel)
    with pytest.raises(ValueError, match="received string input"):
        parallel(tf.constant(TEXTS))
