"""Programs on tables and time series, with several inputs and outputs, and loops of their own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, rng, rows
from tests.programs.text import Block

WIDTH = 8


def table() -> dict[str, np.ndarray]:
    """Numbers, integers and strings by column."""
    return {
        "age": rng(1).integers(20, 80, ROWS).astype("float32"),
        "sex": classes(ROWS, 2),
        "thal": np.array(["fixed", "normal", "reversible"])[classes(ROWS, 3, seed=6)],
        "slope": classes(ROWS, 3, seed=7).astype("float32"),
    }


def feature_space() -> Program:
    """A FeatureSpace adapted to a table, with a cross, inside the model that is trained."""
    space = keras.utils.FeatureSpace(
        features={
            "age": keras.utils.FeatureSpace.float_discretized(num_bins=4),
            "sex": keras.utils.FeatureSpace.integer_categorical(num_oov_indices=0),
            "thal": keras.utils.FeatureSpace.string_categorical(num_oov_indices=1),
            "slope": keras.utils.FeatureSpace.float_normalized(),
        },
        crosses=[keras.utils.FeatureSpace.cross(("sex", "age"), crossing_dim=8)],
        output_mode="concat",
    )
    raw = table()
    space.adapt(tf.data.Dataset.from_tensor_slices(raw).batch(ROWS))
    x = layers.Dense(6, activation="relu")(space.get_encoded_features())
    predictions = layers.Dense(1, activation="sigmoid")(layers.Dropout(0.0)(x))
    model = keras.Model(dict(space.get_inputs()), predictions)
    model.compile(adam(), "binary_crossentropy", metrics=["accuracy"])
    x = {name: tf.constant(column[:, None]) for name, column in sorted(raw.items())}
    return Program(model, x, classes(ROWS, 2)[:, None])


def feature_space_in_data() -> Program:
    """The same in the pipeline of the data: the model takes encoded features."""
    space = keras.utils.FeatureSpace(
        features={"age": "float_normalized", "thal": "string_categorical"}, output_mode="concat"
    )
    raw = {name: table()[name] for name in ("age", "thal")}
    dataset = tf.data.Dataset.from_tensor_slices((raw, classes(ROWS, 2)[:, None]))
    space.adapt(dataset.map(lambda x, _: x).batch(2))
    dataset = dataset.batch(5).map(lambda x, y: (space(x), y))
    encoded = space.get_encoded_features()
    model = keras.Model(encoded, layers.Dense(1, activation="sigmoid")(encoded))
    model.compile(adam(), "binary_crossentropy", metrics=["accuracy"])
    return Program(model, dataset, batch_size=None)


class ColumnPositions(layers.Layer):
    """Adds a row of a table for each column."""

    def __init__(self, columns: int):
        super().__init__()
        self.table, self.columns = layers.Embedding(columns, WIDTH), columns

    def call(self, x):
        return x + self.table(ops.arange(start=0, stop=self.columns, step=1))


def tab_transformer() -> Program:
    """Categories as strings, embedded by column, attend to each other; numbers beside them."""
    raw = table()
    inputs = {
        name: layers.Input((1,), name=name, dtype="string" if name == "thal" else "float32")
        for name in ("age", "slope", "thal", "sex")
    }
    lookups = {
        "thal": layers.StringLookup(vocabulary=["fixed", "normal", "reversible"]),
        "sex": layers.IntegerLookup(vocabulary=[0, 1]),
    }
    embedded = []
    for name, lookup in lookups.items():
        indices = lookup(inputs[name] if name == "thal" else ops.cast(inputs[name], "int64"))
        embedded.append(layers.Embedding(lookup.vocabulary_size(), WIDTH)(indices))
    x = ColumnPositions(len(lookups))(ops.concatenate(embedded, axis=1))
    x = layers.Flatten()(Block()(x))
    numbers = layers.LayerNormalization()(ops.concatenate([inputs["age"], inputs["slope"]], axis=1))
    x = layers.Dense(6, activation="selu")(layers.Concatenate()([x, numbers]))
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
    model.compile(
        keras.optimizers.AdamW(1e-2, weight_decay=1e-3, epsilon=1e-4),
        keras.losses.BinaryCrossentropy(),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy")],
    )
    x = {name: column[:, None] for name, column in raw.items()}
    x["sex"] = x["sex"].astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, classes(ROWS, 2)[:, None], rows(ROWS) ** 2))
    return Program(model, dataset.batch(5), batch_size=None)


def inputs_and_outputs() -> Program:
    """Dicts for inputs, losses, their weights, metrics and the weights of samples."""
    title, body = keras.Input((None,), name="title"), keras.Input((None,), name="body")
    tags = keras.Input((4,), name="tags")
    read = layers.LSTM(5)(layers.Embedding(20, WIDTH)(title))
    x = layers.concatenate([read, layers.GRU(4)(layers.Embedding(20, WIDTH)(body)), tags])
    model = keras.Model(
        {"title": title, "body": body, "tags": tags},
        {
            "priority": layers.Dense(1, name="priority")(x),
            "department": layers.Dense(4, name="department")(x),
        },
    )
    model.compile(
        keras.optimizers.RMSprop(1e-2),
        loss={
            "priority": keras.losses.BinaryCrossentropy(from_logits=True),
            "department": keras.losses.CategoricalCrossentropy(from_logits=True),
        },
        metrics={
            "priority": ["mae", "mse"],
            "department": keras.metrics.AUC(from_logits=True, name="auc"),
        },
        weighted_metrics={"department": "accuracy"},
        loss_weights={"priority": 1.0, "department": 0.2},
    )
    ids = rng().integers(0, 20, (ROWS, 9)).astype("float32")
    x = {"title": ids[:, :4], "body": ids[:, 4:], "tags": rows(ROWS, 4)}
    y = {
        "priority": rng(1).random((ROWS, 1)).astype("float32"),
        "department": keras.utils.to_categorical(classes(ROWS, 4), 4),
    }
    weights = {"priority": rows(ROWS) ** 2, "department": rows(ROWS, seed=1) ** 2}
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(5)
    return Program(model, dataset, batch_size=None)


def imbalanced_classes() -> Program:
    """Weights for classes, metrics that count, and callbacks that look at them."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Normalization(),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.0),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    x = rows(ROWS, 6) * 3 + 1
    model.layers[0].adapt(x)
    model.compile(
        keras.optimizers.Adam(1e-2, epsilon=1e-4, clipnorm=0.5),
        "binary_crossentropy",
        metrics=[
            keras.metrics.FalseNegatives(name="fn"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.F1Score(threshold=0.5, name="f1"),
        ],
    )
    y = classes(ROWS, 2)[:, None].astype("float32")
    fit: dict[str, Any] = {
        "class_weight": {0: 0.2, 1: 3.0},
        "validation_data": (x[:4], y[:4]),
        "callbacks": [keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=0, min_delta=10.0)],
    }
    return Program(model, x, y, epochs=3, fit=fit)


class DecisionTree(keras.Model):
    """Routes rows through a tree by learned, soft decisions."""

    def __init__(self, depth: int = 2, num_classes: int = 3):
        super().__init__()
        self.depth, self.num_classes = depth, num_classes
        self.num_leaves = 2**depth
        self.used = np.eye(6)[[0, 2, 3, 5]]
        self.pi = self.add_weight(
            initializer="random_normal", shape=[self.num_leaves, num_classes], name="pi"
        )
        self.decision_fn = layers.Dense(self.num_leaves, activation="sigmoid", name="decision")

    def call(self, features):
        batch_size = ops.shape(features)[0]
        features = ops.matmul(features, ops.transpose(ops.cast(self.used, "float32")))
        decisions = ops.expand_dims(self.decision_fn(features), axis=2)
        decisions = layers.concatenate([decisions, 1 - decisions], axis=2)
        mu = ops.ones([batch_size, 1, 1])
        begin_idx, end_idx = 1, 2
        for level in range(self.depth):
            mu = ops.reshape(mu, [batch_size, -1, 1])
            mu = ops.tile(mu, (1, 1, 2)) * decisions[:, begin_idx:end_idx, :]
            begin_idx, end_idx = end_idx, end_idx + 2 ** (level + 1)
        mu = ops.reshape(mu, [batch_size, self.num_leaves])
        return ops.matmul(mu, keras.activations.softmax(self.pi))


class DecisionForest(keras.Model):
    """The mean of some trees."""

    def __init__(self, trees: int = 2):
        super().__init__()
        self.ensemble = [DecisionTree() for _ in range(trees)]

    def call(self, inputs):
        outputs = ops.zeros((ops.shape(inputs)[0], 3))
        for tree in self.ensemble:
            outputs += tree(inputs)
        return outputs / len(self.ensemble)


def decision_forest() -> Program:
    inputs = keras.Input((6,))
    features = layers.BatchNormalization(synchronized=True)(inputs)
    model = keras.Model(inputs, DecisionForest()(features))
    model.compile(adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Program(model, rows(ROWS, 6), classes(ROWS, 3))


def weather() -> Program:
    """Windows of a series by `timeseries_dataset_from_array`, and an LSTM."""
    series = rows(16, 3)
    dataset = keras.utils.timeseries_dataset_from_array(
        series, series[6:, :1], sequence_length=3, sampling_rate=2, batch_size=5, shuffle=False
    )
    inputs = keras.Input((3, 3))
    model = keras.Model(inputs, layers.Dense(1)(layers.LSTM(5)(inputs)))
    model.compile(adam(), "mse", metrics=[keras.metrics.RootMeanSquaredError()])
    return Program(model, dataset, batch_size=None)


class RoadsOverTime(layers.Layer):
    """A graph convolution over fixed roads, then an LSTM for each, rows on the second axis."""

    def __init__(self, adjacency: np.ndarray, width: int = 4):
        super().__init__()
        self.sources, self.targets = np.nonzero(adjacency)
        self.nodes, self.width = len(adjacency), width
        self.lstm = layers.LSTM(5, activation="relu")
        self.dense = layers.Dense(2)

    def build(self, shape):
        self.weight = self.add_weight(
            shape=(shape[-1], self.width), initializer="glorot_uniform", name="w"
        )

    def call(self, inputs):
        features = ops.transpose(inputs, [2, 0, 1, 3])  # nodes, rows, times, numbers
        neighbours = ops.take(features, self.targets, axis=0)
        total = tf.math.unsorted_segment_mean(neighbours, self.sources, self.nodes)
        x = ops.concatenate([features @ self.weight, total @ self.weight], axis=-1)
        shape = ops.shape(x)
        x = self.lstm(ops.reshape(x, (shape[0] * shape[1], shape[2], shape[3])))
        x = ops.reshape(self.dense(x), (shape[0], shape[1], 2))
        return ops.transpose(x, [1, 2, 0])


def traffic() -> Program:
    inputs = keras.Input((4, 5, 1))
    adjacency = (rng(4).random((5, 5)) < 0.4) | np.eye(5, dtype=bool)
    model = keras.Model(inputs, RoadsOverTime(adjacency)(inputs))
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.MeanSquaredError())
    return Program(model, rows(ROWS, 4, 5, 1), rows(ROWS, 2, 5, seed=1))


def next_frame() -> Program:
    """ConvLSTM2D with normalisation over the whole batch."""
    inputs = keras.Input((None, 6, 6, 1))
    x = layers.ConvLSTM2D(2, 3, padding="same", return_sequences=True, activation="relu")(inputs)
    x = layers.BatchNormalization(synchronized=True)(x)
    x = layers.Conv3D(1, 3, activation="sigmoid", padding="same")(x)
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.BinaryCrossentropy())
    frames = rng().random((ROWS, 4, 6, 6, 1)).astype("float32")
    return Program(model, frames[:, :-1], frames[:, 1:], rtol=1e-4)


def anomaly_detection() -> Program:
    """Convolutions there and back, with a callback that stops early and restores weights."""
    model = keras.Sequential(
        [
            keras.Input((8, 1)),
            layers.Conv1D(4, 3, padding="same", strides=2, activation="relu"),
            layers.Dropout(0.0),
            layers.Conv1DTranspose(3, 3, padding="same", strides=2, activation="relu"),
            layers.Conv1DTranspose(1, 3, padding="same"),
        ]
    )
    model.compile(adam(), "mse")
    x = rows(ROWS, 8, 1)
    stop = keras.callbacks.EarlyStopping(patience=1, mode="min", restore_best_weights=True)
    return Program(model, x, x, fit={"validation_split": 0.3, "callbacks": [stop]})


class Quantiles(keras.Model):
    """Metrics of its own in the model, updated in its `call`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(6, activation="relu"), layers.Dense(3)
        self.spread = keras.metrics.Mean(name="spread")

    def call(self, x):
        y = self.out(self.hidden(x))
        self.spread.update_state(y[:, 2] - y[:, 0])
        return y


def pinball(y_true, y_pred):
    error = y_true - y_pred
    quantiles = ops.convert_to_tensor([0.1, 0.5, 0.9])
    return ops.mean(ops.maximum(quantiles * error, (quantiles - 1) * error), axis=-1)


def quantile_regression() -> Program:
    model = Quantiles()
    model.compile(adam(), loss=pinball)
    return Program(model, rows(ROWS, 6), rows(ROWS, 1, seed=1))


def own_loop() -> Program:
    """The loop of the guide: a tape around the model, `apply`, a metric, no `compile`."""

    def train(model: keras.Model, program: Program) -> dict[str, Any]:
        optimizer = adam()
        program.model.optimizer = optimizer
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metric = keras.metrics.SparseCategoricalAccuracy()
        losses = []

        @tf.function
        def train_step(x, y):
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                loss_value = loss_fn(y, logits) + sum(model.losses)
            grads = tape.gradient(loss_value, model.trainable_weights)
            optimizer.apply(grads, model.trainable_weights)
            metric.update_state(y, logits)
            return loss_value

        for _ in range(2):
            for x, y in tf.data.Dataset.from_tensor_slices((program.x, program.y)).batch(5):
                losses.append(float(train_step(x, y)))
        return {"loss": losses, "accuracy": float(metric.result())}

    inputs = keras.Input((6,))
    x = layers.Dense(5, activation="relu", activity_regularizer="l2")(inputs)
    model = keras.Model(inputs, layers.Dense(3, kernel_regularizer="l2")(x))
    return Program(model, rows(ROWS, 6), classes(ROWS, 3), train=train, skip=("evaluate",))


def q_learning() -> Program:
    """Two nets, one copied to the other now and then; actions by direct calls, a loop by hand."""

    def train(model: keras.Model, program: Program) -> dict[str, Any]:
        target = keras.models.clone_model(program.model)
        target.set_weights(program.model.get_weights())
        optimizer = keras.optimizers.Adam(1e-2, epsilon=1e-4, clipnorm=1.0)
        loss_function = keras.losses.Huber()
        actions, losses = [], []
        states = program.x
        for step in range(4):
            action = ops.argmax(model(states[step : step + 1], training=False)[0])
            actions.append(int(action))
            future = ops.max(target.predict(states[1:], verbose=0), axis=1)
            updated = rows(ROWS - 1, seed=step) + 0.9 * future
            masks = ops.one_hot(classes(ROWS - 1, 3, seed=step), 3)
            with tf.GradientTape() as tape:
                q_values = model(states[:-1])
                q_action = ops.sum(ops.multiply(q_values, masks), axis=1)
                loss = loss_function(updated, q_action)
            grads = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
            losses.append(float(loss))
            if step == 1:
                target.set_weights(model.get_weights())
        return {"action": actions, "loss": losses}

    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, activation="relu"), layers.Dense(3)]
    )
    return Program(model, rows(ROWS, 4), train=train, skip=("evaluate",))


PROGRAMS = (
    feature_space,
    feature_space_in_data,
    tab_transformer,
    inputs_and_outputs,
    imbalanced_classes,
    decision_forest,
    weather,
    traffic,
    next_frame,
    anomaly_detection,
    quantile_regression,
    own_loop,
    q_learning,
)
