"""What workers are asked to do, and the bare model on one device beside them.

Each case is a function that makes models, wraps them by what it is given, and returns numbers.
Run as a program this file is one worker: it does all cases and writes the numbers to a file.
"""

import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import parallel_keras as pk
from tests.parity import batches, rows

Numbers = dict[str, np.ndarray]
CASES: dict[str, Callable[..., Numbers]] = {}


def case(function: Callable[..., Numbers]) -> Callable[..., Numbers]:
    CASES[function.__name__] = function
    return function


def numbers(model: keras.Model, history: Any = None, **more: Any) -> Numbers:
    """Every variable of a model and its optimizer, and every number of its History."""
    found = {f"weight {i}": v.numpy() for i, v in enumerate(model.variables_of_template)}
    if getattr(model, "optimizer", None) is not None:
        found |= {f"optimizer {i}": v.numpy() for i, v in enumerate(model.optimizer.variables)}
    if history is not None:
        found |= {f"history {key}": np.array(value) for key, value in history.history.items()}
    return found | {key: np.asarray(value) for key, value in more.items()}


def labels(count: int, classes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, count)


def mlp(outputs: int = 3, **last: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(7, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(outputs, **last),
        ]
    )


@case
def uneven_batches(wrap: Any) -> Numbers:
    """Also batches smaller than the number of workers and of towers."""
    model = wrap(mlp())
    model.compile("adam", "mse", metrics=["mae"])
    sizes = [9, 1, 4, 2, 3, 7, 5]
    data = batches(sizes, rows(31, 6), rows(31, 3, seed=1))
    history = model.fit(data, epochs=2, verbose=0)
    scores = model.evaluate(data, verbose=0)
    return numbers(model, history, scores=scores, outputs=model.predict(data, verbose=0))


@case
def static_batches(wrap: Any) -> Numbers:
    """Batch sizes that are known while tracing."""
    model = wrap(mlp())
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    losses = [
        model.train_on_batch(rows(size, 6, seed=size), rows(size, 3, seed=size + 50))
        for size in (8, 1, 5)
    ]
    return numbers(model, losses=losses, outputs=model.predict_on_batch(rows(3, 6)))


@case
def shuffled_arrays(wrap: Any) -> Numbers:
    """W5: https://github.com/tensorflow/tensorflow/issues/56513."""
    model = wrap(mlp())
    model.compile("sgd", "mse")
    keras.utils.set_random_seed(3)
    history = model.fit(rows(22, 6), rows(22, 3, seed=1), batch_size=5, epochs=2, verbose=0)
    return numbers(model, history)


@case
def dict_inputs_and_normalization(wrap: Any) -> Numbers:
    """W1: https://github.com/keras-team/keras/issues/20329."""
    keras.utils.set_random_seed(7)
    wide, deep = keras.Input((4,), name="wide"), keras.Input((6,), name="deep")
    # A bias would only be moved by rounding errors, which Adam makes as large as gradients.
    hidden = keras.layers.Dense(5, use_bias=False)(deep)
    hidden = keras.layers.BatchNormalization(synchronized=True, momentum=0.8)(hidden)
    merged = keras.layers.Concatenate()([wide, keras.layers.Activation("tanh")(hidden)])
    model = wrap(keras.Model({"wide": wide, "deep": deep}, keras.layers.Dense(2)(merged)))
    model.compile("adam", "mse")
    x = {"wide": rows(23, 4), "deep": rows(23, 6, seed=2)}
    data = batches([8, 3, 6, 1, 5], x, rows(23, 2, seed=1))
    history = model.fit(data, epochs=3, verbose=0)
    return numbers(model, history, outputs=model.predict(data, verbose=0))


@keras.saving.register_keras_serializable(package="tests")
def contrastive(y_true: Any, y_pred: Any) -> Any:
    """Every row against every other one of the batch."""
    scores = keras.ops.matmul(y_pred, keras.ops.transpose(y_pred))
    return keras.ops.logsumexp(scores, axis=-1) - keras.ops.sum(y_true * y_pred, axis=-1)


@case
def loss_of_the_whole_batch(wrap: Any) -> Numbers:
    model = wrap(mlp())
    model.compile("adam", contrastive, metrics=["mae"])
    data = batches([8, 3, 1, 6], rows(18, 6), rows(18, 3, seed=1))
    history = model.fit(data, epochs=2, verbose=0, validation_data=data)
    return numbers(model, history)


@keras.saving.register_keras_serializable(package="tests")
class Seen(keras.layers.Layer):
    """Counts how often it was given each row."""

    def build(self, shape: Any) -> None:
        self.seen = self.add_weight(
            shape=(20,), initializer="zeros", trainable=False, aggregation="sum", name="seen"
        )

    def call(self, x: Any, training: Any = None) -> Any:
        if training:
            ids = tf.cast(x[:, 0], tf.int32)
            self.seen.assign_add(tf.reduce_sum(tf.one_hot(ids, 20), axis=0))
        return x[:, 1:]


@case
def every_row_once(wrap: Any) -> Numbers:
    """W5: https://github.com/tensorflow/tensorflow/issues/36846."""
    keras.utils.set_random_seed(7)
    model = wrap(keras.Sequential([keras.Input((4,)), Seen(), keras.layers.Dense(1)]))
    model.compile("sgd", "mse")
    x = np.concatenate([np.arange(20, dtype="float32")[:, None], rows(20, 3)], axis=1)
    model.fit(x, rows(20, 1, seed=1), batch_size=6, verbose=0)
    return {"seen": model.variables_of_template[0].numpy()}


@case
def normalization_statistics(wrap: Any) -> Numbers:
    """By default each shard is normalised by itself, the statistics are the whole batch's."""
    keras.utils.set_random_seed(7)
    layers = [keras.Input((5,)), keras.layers.BatchNormalization(momentum=0.7)]
    model = wrap(keras.Sequential([*layers, keras.layers.Dense(1)]))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(batches([7, 9, 2], rows(18, 5), rows(18, 1, seed=1)), verbose=0)
    return {f"weight {i}": v.numpy() for i, v in enumerate(model.variables_of_template)}


@case
def merged_path(wrap: Any) -> Numbers:
    model = wrap(mlp(), loss_on="merged")
    model.compile("adam", "mse")
    data = batches([8, 3, 1, 6], rows(18, 6), rows(18, 3, seed=1))
    return numbers(model, model.fit(data, epochs=2, verbose=0))


@case
def terms_of_layers(wrap: Any) -> Numbers:
    """Activity regularisers are a part of the loss that no output leads to."""
    found = {}
    for path in ("auto", "merged"):
        keras.utils.set_random_seed(7)
        hidden = keras.layers.Dense(5, activity_regularizer=keras.regularizers.L2(0.5))
        layers = [keras.Input((6,)), hidden, keras.layers.Dense(3)]
        model = wrap(keras.Sequential(layers), loss_on=path)
        model.compile("sgd", "mse")
        data = batches([8, 3, 1, 6], rows(18, 6), rows(18, 3, seed=1))
        history = model.fit(data, epochs=2, verbose=0)
        found |= {f"{path} {key}": value for key, value in numbers(model, history).items()}
    return found


@keras.saving.register_keras_serializable(package="tests")
class Largest(keras.metrics.Metric):
    """Looks at all rows at once."""

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del sample_weight
        self.value.assign_add(keras.ops.max(y_true) - keras.ops.max(y_pred))

    def result(self) -> Any:
        return self.value


@case
def metrics(wrap: Any) -> Numbers:
    kinds = {
        "on towers": ["accuracy", keras.metrics.AUC(name="auc"), keras.metrics.Precision()],
        "on the whole batch": [Largest()],
    }
    found = {}
    for name, chosen in kinds.items():
        model = wrap(mlp(1, activation="sigmoid"))
        model.compile("sgd", "binary_crossentropy", metrics=chosen)
        y = labels(18, 2).astype("float32")[:, None]
        data = batches([8, 3, 1, 6], rows(18, 6), y, rows(18, seed=5) ** 2)
        history = model.fit(data, epochs=2, verbose=0, validation_data=data)
        found |= {f"{name} {key}": value for key, value in numbers(model, history).items()}
    return found


@case
def steps_per_execution(wrap: Any) -> Numbers:
    found = {}
    for path in ("auto", "merged"):
        model = wrap(mlp(), loss_on=path)
        model.compile("adam", "mse", steps_per_execution=2)
        history = model.fit(
            rows(27, 6), rows(27, 3, seed=1), batch_size=5, epochs=2, shuffle=False, verbose=0
        )
        found |= {f"{path} {key}": value for key, value in numbers(model, history).items()}
    return found


@case
def tutorial(wrap: Any) -> Numbers:
    """W1: https://github.com/keras-team/keras/issues/20585.

    The scenario of TensorFlow's tutorial on several workers: images of 28x28, a small
    convolutional net, SGD, 64 rows for each of two workers, `steps_per_epoch`, 3 epochs.
    """
    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = wrap(
        keras.Sequential(
            [
                keras.Input((28, 28)),
                layers.Reshape((28, 28, 1)),
                layers.Conv2D(8, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(16, activation="relu"),
                layers.Dense(10),
            ]
        )
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, metrics=["accuracy"])
    data = tf.data.Dataset.from_tensor_slices((rows(300, 28, 28), labels(300, 10)))
    data = data.shuffle(300, seed=5).repeat().batch(128)
    return numbers(model, model.fit(data, epochs=3, steps_per_epoch=3, verbose=0))


@case
def embedding(wrap: Any) -> Numbers:
    found = {}
    # The larger table stays where it is, the smaller one is copied to the towers.
    for path, size in itertools.product(("auto", "merged"), ((11, 3), (8192, 32))):
        keras.utils.set_random_seed(7)
        model = wrap(
            keras.Sequential(
                [
                    keras.Input((4,), dtype="int32"),
                    keras.layers.Embedding(*size),
                    keras.layers.Flatten(),
                    keras.layers.Dense(2),
                ]
            ),
            loss_on=path,
        )
        model.compile("adam", "mse")
        words = np.random.default_rng(0).integers(0, 11, (18, 4)).astype("int32")
        data = batches([8, 3, 1, 6], words, rows(18, 2, seed=1))
        history = model.fit(data, epochs=2, verbose=0)
        found |= {f"{path} {size} {key}": v for key, v in numbers(model, history).items()}
    return found


@keras.saving.register_keras_serializable(package="tests")
class Positions(keras.layers.Layer):
    """Adds a table of positions, and of words from the same table."""

    def build(self, shape: Any) -> None:
        self.table = keras.layers.Embedding(12, shape[-1])
        self.table.build(None)

    def call(self, x: Any) -> Any:
        words = keras.ops.cast(keras.ops.abs(x[:, :, 0]) * 3, "int32") % 8
        return x + self.table(8 + keras.ops.arange(x.shape[1])) + self.table(words)


@keras.saving.register_keras_serializable(package="tests")
class TakesOwnSteps(keras.Model):
    def train_step(self, data: Any) -> Any:
        x, y = data[0], data[1]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@case
def position_table(wrap: Any) -> Numbers:
    """X1: rows of a table that each tower of each worker looks up for itself."""
    found = {}
    for kind, path in ((keras.Model, "auto"), (keras.Model, "merged"), (TakesOwnSteps, "auto")):
        keras.utils.set_random_seed(7)
        inputs = keras.Input((4, 3))
        outputs = keras.layers.Dense(2)(keras.layers.Flatten()(Positions()(inputs)))
        model = wrap(kind(inputs, outputs), loss_on=path)
        model.compile("adam", "mse")
        history = model.fit(
            batches([8, 3, 1, 6], rows(18, 4, 3), rows(18, 2, seed=1)), epochs=2, verbose=0
        )
        key = f"{kind.__name__} {path}"
        found |= {f"{key} {name}": value for name, value in numbers(model, history).items()}
    return found


@case
def terms_of_the_loss(wrap: Any) -> Numbers:
    """X9: with a value for each row, and of a regulariser that looks at all rows."""
    found = {}
    for path in ("auto", "merged"):
        keras.utils.set_random_seed(7)
        model = wrap(
            keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(5, activation="sigmoid"),
                    AddsRows(),
                    keras.layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1)),
                    keras.layers.Dense(3, activity_regularizer=variance),
                ]
            ),
            loss_on=path,
        )
        model.compile("sgd", "mse")
        data = batches([8, 3, 1, 6], rows(18, 6), rows(18, 3, seed=1))
        history = model.fit(data, epochs=2, verbose=0)
        found |= {f"{path} {key}": value for key, value in numbers(model, history).items()}
    return found


@keras.saving.register_keras_serializable(package="tests")
class AddsRows(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * keras.ops.sum(x**2, axis=-1, keepdims=True))
        return x


@keras.saving.register_keras_serializable(package="tests")
def variance(x: Any) -> Any:
    return 0.3 * keras.ops.sum(keras.ops.var(x, axis=0))


@case
def own_loop(wrap: Any) -> Numbers:
    """A gradient tape, and the gradient of a gradient."""
    model = wrap(mlp())
    optimizer = keras.optimizers.SGD(0.1)

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = tf.reduce_sum(model(x, training=True) ** 2)
            slope = inner.gradient(value, x)
            loss = value + tf.reduce_mean((tf.norm(slope, axis=1) - 1) ** 2)
        gradients = outer.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    losses = [float(step(tf.constant(rows(size, 6, seed=size)))) for size in (5, 3, 8)]
    return numbers(model, losses=losses)


@keras.saving.register_keras_serializable(package="tests")
class Doubling(keras.Model):
    """Takes a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True)) * 2
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@case
def step_of_the_template(wrap: Any) -> Numbers:
    keras.utils.set_random_seed(7)
    template = Doubling()
    template(np.zeros((2, 6), "float32"))
    model = wrap(template)
    model.compile("sgd", "mse")
    data = batches([8, 3, 1, 6], rows(18, 6), rows(18, 3, seed=1))
    return numbers(model, model.fit(data, epochs=2, verbose=0))


@case
def eagerly(wrap: Any) -> Numbers:
    model = wrap(mlp())
    model.compile("sgd", "mse", run_eagerly=True)
    data = batches([5, 1, 3], rows(9, 6), rows(9, 3, seed=1))
    return numbers(model, model.fit(data, verbose=0))


@case
def double_precision(wrap: Any) -> Numbers:
    keras.utils.set_random_seed(7)
    template = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, dtype="float64")])
    model = wrap(template)
    model.compile("sgd", "mse")
    data = batches([5, 1, 3], rows(9, 6), rows(9, 3, seed=1))
    return numbers(model, model.fit(data, verbose=0))


@case
def unbuilt(wrap: Any) -> Numbers:
    """The weights of the first worker count."""
    keras.utils.set_random_seed(7 + (wrap.index or 0))
    model = wrap(keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)]))
    model.compile("adam", "mse")
    data = batches([5, 1, 3], rows(9, 6), rows(9, 3, seed=1))
    history = model.fit(data, verbose=0)
    return numbers(model, history)


@case
def ragged_outputs(wrap: Any) -> Numbers:
    """Outputs whose size differs from tower to tower."""

    keras.utils.set_random_seed(7)
    inputs = keras.Input((5,))
    kept = keras.layers.Lambda(
        lambda x: tf.ragged.boolean_mask(x, x > 0), output_shape=(None,), name="kept"
    )(inputs)
    model = wrap(keras.Model(inputs, {"kept": kept, "twice": inputs * 2}))
    outputs = model(tf.constant(rows(7, 5)))
    return {
        "values": outputs["kept"].flat_values.numpy(),
        "lengths": outputs["kept"].row_lengths().numpy(),
        "twice": outputs["twice"].numpy(),
    }


def _share(wrap: Any, *arrays: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """This worker's rows, where workers have so many; all of them on one device."""
    if wrap.index is None:
        return arrays
    start = sum(sizes[: wrap.index])
    return tuple(array[start : start + sizes[wrap.index]] for array in arrays)


@case
def own_rows(wrap: Any) -> Numbers:
    """Each worker has other rows, and not as many. One device gets them side by side.

    W2: https://github.com/tensorflow/tensorflow/issues/36153.
    """
    sizes = (11, 3, 5)
    workers = wrap.size
    count = sum(sizes[:workers])
    x, y = rows(count, 6), rows(count, 3, seed=1)
    found = {}
    for path, chosen in (("auto", ["mae"]), ("merged", []), ("auto", [Largest()])):
        model = wrap(mlp(), loss_on=path, rules={"batch": "own"})
        model.compile("adam", "mse", metrics=chosen)
        if wrap.index is None:
            own = batches(*_steps(sizes[:workers], 4, x, y))
        else:
            shared = _share(wrap, x, y, sizes=sizes)
            own = tf.data.Dataset.from_tensor_slices(shared).batch(4)
        history = model.fit(own, epochs=2, verbose=0, validation_data=own)
        scores = model.evaluate(own, verbose=0)
        outputs = model.predict(own if wrap.index is not None else x, verbose=0)
        name = f"{path} {len(chosen)} {getattr(chosen[0], 'name', '') if chosen else ''}"
        found |= {
            f"{name} {key}": value for key, value in numbers(model, history, scores=scores).items()
        }
        found[f"rows of the worker {name}"] = outputs
    return found


def _steps(sizes: tuple[int, ...], batch: int, *arrays: Any) -> tuple[Any, ...]:
    """The rows in the order in which the steps of all workers take them."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order, counts = [], []
    for step in range(max(-(-size // batch) for size in sizes)):
        taken = [
            np.arange(start + step * batch, start + min((step + 1) * batch, size))
            for start, size in zip(starts, sizes, strict=False)
        ]
        order.append(np.concatenate(taken))
        counts.append(len(order[-1]))
    every = np.concatenate(order)
    return counts, *(array[every] for array in arrays)


@case
def files(wrap: Any) -> Numbers:
    """W3: https://github.com/tensorflow/tensorflow/issues/38635.

    Each worker has a folder of its own here, which shows who writes.
    """
    folder = wrap.folder / f"files_{wrap.index}"
    folder.mkdir()
    model = wrap(mlp())
    model.compile("adam", "mse")
    data = batches([5, 1, 3], rows(9, 6), rows(9, 3, seed=1))
    callbacks = [
        keras.callbacks.ModelCheckpoint(folder / "full.keras"),
        keras.callbacks.ModelCheckpoint(folder / "weights.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False),
        keras.callbacks.CSVLogger(folder / "log.csv"),
    ]
    history = model.fit(data, epochs=2, verbose=0, callbacks=callbacks)
    model.save(folder / "all.keras")
    if wrap.index in (0, None):
        model.save(folder / "alone.keras")  # W3: this must not wait for the others.
        loaded = keras.saving.load_model(folder / "alone.keras")
        assert loaded.optimizer.iterations == 6
    return numbers(model, history, again=model.evaluate(data, verbose=0))


@case
def traffic(wrap: Any) -> Numbers:
    """The bytes of a step, as a part of the bytes of the weights."""
    keras.utils.set_random_seed(7)
    layers = [keras.Input((50,)), keras.layers.Dense(400), keras.layers.Dense(50)]
    model = wrap(keras.Sequential(layers))
    model.compile("sgd", "mse")
    model.fit(rows(16, 50), rows(16, 50, seed=1), batch_size=8, verbose=0)
    ideal = 2 * (wrap.size - 1) / wrap.size * 4 * model.count_params()
    sent = ideal if wrap.index is None else model.bytes_per_step
    return {"ratio rounded": np.round(np.array(sent / ideal), 2)}


class Bare:
    """Wraps nothing: the model on one device.

    Args:
        like: Int, the number of workers that it is compared with.
    """

    def __init__(self, like: int, folder: Path) -> None:
        self.index, self.size, self.folder = None, like, folder

    def __call__(self, template: keras.Model, **arguments: Any) -> keras.Model:
        del arguments
        type(template).variables_of_template = property(lambda self: self.variables)
        return template


class OnWorker:
    """Wraps in a `DataParallelModel` of one worker.

    Args:
        strategy: The strategy.
        towers: Int.
    """

    def __init__(self, strategy: Any, towers: int, folder: Path) -> None:
        self.strategy, self.towers, self.folder = strategy, towers, folder
        resolver = strategy.cluster_resolver
        self.index = resolver.task_id
        self.size = sum(map(len, resolver.cluster_spec().as_dict().values()))

    def __call__(self, template: keras.Model, **arguments: Any) -> pk.DataParallelModel:
        model = pk.DataParallelModel(template, self.towers, strategy=self.strategy, **arguments)
        type(model).variables_of_template = property(lambda self: self.template.variables)
        return model


def worker(settings: dict[str, Any]) -> None:
    """One worker: does the cases and writes what they return."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    towers, folder = settings["towers"], Path(settings["folder"])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(4)
    pk.virtual_devices(2)
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=settings["timeout"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    wrap = OnWorker(strategy, towers, folder)
    found = {}
    for name in settings["cases"]:
        start = time.monotonic()
        print(f"case {name}", flush=True)
        found |= {f"{name}/{key}": value for key, value in CASES[name](wrap).items()}
        print(f"case {name} took {time.monotonic() - start:.1f} s", flush=True)
        np.savez(folder / f"worker_{wrap.index}.npz", **found)
    print("done", flush=True)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
