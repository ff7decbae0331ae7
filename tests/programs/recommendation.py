"""Programs that recommend: two towers, matrix factorisation, ranking, sequences."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, padded, rng, rows, tokens
from tests.programs.text import Block, TokenAndPosition

USERS, ITEMS, WIDTH = 10, 15, 6


class TwoTower(keras.Model):
    """Retrieval: the other items of the batch are each user's negatives."""

    def __init__(self, users: list[str]):
        super().__init__()
        self.query_model = keras.Sequential(
            [layers.StringLookup(vocabulary=users), layers.Embedding(USERS + 1, WIDTH)]
        )
        self.candidate_model = keras.Sequential(
            [layers.Embedding(ITEMS, WIDTH), layers.Dense(WIDTH)]
        )
        self.top = keras.metrics.SparseTopKCategoricalAccuracy(2, name="top_2")

    def call(self, inputs):
        return self.query_model(inputs["user"]), self.candidate_model(inputs["item"])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        queries, candidates = y_pred
        scores = tf.matmul(queries, candidates, transpose_b=True)
        labels = tf.range(tf.shape(scores)[0])
        self.top.update_state(labels, scores)
        log_of_chance = tf.math.log(tf.cast(x["count"], "float32") / 10.0)
        scores -= tf.expand_dims(log_of_chance, 0)
        losses = keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True)
        return tf.reduce_sum(losses)

    @property
    def metrics(self):
        return [*super().metrics, self.top]


def two_tower() -> Program:
    names = [f"user {i}" for i in range(USERS)]
    model = TwoTower(names)
    model.compile(optimizer=keras.optimizers.Adagrad(0.1))
    x = {
        "user": tf.constant([names[i] for i in classes(ROWS, USERS)]),
        "item": classes(ROWS, ITEMS, seed=1),
        "count": rng(2).integers(1, 9, ROWS).astype("int32"),
    }
    return Program(model, tf.data.Dataset.from_tensor_slices(x).batch(5), batch_size=None)


class MatrixFactorisation(keras.Model):
    """Products of embeddings and a bias for each; `row_by_row=False` multiplies all rows."""

    def __init__(self, *, row_by_row: bool = True):
        super().__init__()
        regularizer = keras.regularizers.l2(1e-3)
        self.row_by_row = row_by_row
        self.user_embedding = layers.Embedding(USERS, WIDTH, embeddings_regularizer=regularizer)
        self.user_bias = layers.Embedding(USERS, 1)
        self.movie_embedding = layers.Embedding(ITEMS, WIDTH, embeddings_regularizer=regularizer)
        self.movie_bias = layers.Embedding(ITEMS, 1)

    def call(self, inputs):
        user, movie = inputs[:, 0], inputs[:, 1]
        user_vector, movie_vector = self.user_embedding(user), self.movie_embedding(movie)
        if self.row_by_row:
            dot = ops.sum(user_vector * movie_vector, axis=1, keepdims=True)
        else:
            dot = ops.tensordot(user_vector, movie_vector, 2)
        return ops.nn.sigmoid(dot + self.user_bias(user) + self.movie_bias(movie))


def ratings() -> tuple[np.ndarray, np.ndarray]:
    x = np.stack([classes(ROWS, USERS), classes(ROWS, ITEMS, seed=1)], axis=1)
    return x, rng(2).random(ROWS).astype("float32")


def matrix_factorisation() -> Program:
    model = MatrixFactorisation()
    model.compile(adam(), loss=keras.losses.BinaryCrossentropy())
    return Program(model, *ratings())


def all_pairs_factorisation() -> Program:
    """As widely copied: `tensordot` over two axes is one number for the whole batch."""
    model = MatrixFactorisation(row_by_row=False)
    model.compile(adam(), loss=keras.losses.BinaryCrossentropy())
    return Program(model, *ratings())


def behaviour_sequence() -> Program:
    """Attention over the films that a user saw, and strings for the user, split in the data."""
    seen = layers.Input((4,), dtype="int32", name="seen")
    user = layers.Input((1,), dtype="string", name="user")
    names = [str(i) for i in range(USERS)]
    x = Block(WIDTH)(TokenAndPosition(4, ITEMS, WIDTH)(seen))
    embedded = layers.Embedding(USERS + 1, WIDTH)(layers.StringLookup(vocabulary=names)(user))
    x = layers.Concatenate()([layers.Flatten()(x), layers.Flatten()(embedded)])
    # Two rows that are normalised by themselves would amplify rounding without bounds.
    normalise = layers.BatchNormalization(epsilon=0.1, synchronized=True)
    x = layers.LeakyReLU()(normalise(layers.Dense(8)(x)))
    model = keras.Model([seen, user], layers.Dense(1)(x))
    model.compile(
        keras.optimizers.Adagrad(0.01),
        loss=keras.losses.MeanSquaredError(),
        metrics=[keras.metrics.MeanAbsoluteError()],
    )
    data = {
        "seen": [",".join(map(str, row)) for row in tokens(ROWS, 4, count=ITEMS)],
        "user": [names[i] for i in classes(ROWS, USERS)],
    }

    def process(features, rating):
        split = tf.strings.split(features["seen"], ",").to_tensor()
        films = tf.strings.to_number(split, out_type=tf.int32)
        return {
            "seen": tf.ensure_shape(films, (None, 4)),
            "user": features["user"][:, None],
        }, rating

    dataset = tf.data.Dataset.from_tensor_slices((data, rows(ROWS))).batch(5).map(process)
    return Program(model, dataset, batch_size=None, rtol=1e-4)


class Cross(layers.Layer):
    """One layer of a deep & cross net, of low rank."""

    def build(self, shape):
        self.down = layers.Dense(2, use_bias=False)
        self.up = layers.Dense(shape[-1])

    def call(self, x0, x=None):
        x = x0 if x is None else x
        return x0 * self.up(self.down(x)) + x


class Ranker(keras.Model):
    """Two tasks, ratings and clicks, on hashed and crossed features."""

    def __init__(self):
        super().__init__()
        self.hashing = layers.Hashing(8)
        self.crossing = layers.HashedCrossing(num_bins=8, output_mode="one_hot")
        self.embedding = layers.Embedding(8, WIDTH, name="ids")
        self.cross = Cross()
        self.rating, self.click = layers.Dense(1), layers.Dense(1, activation="sigmoid")

    def call(self, inputs):
        crossed = self.crossing((inputs["city"], inputs["hour"]))
        embedded = self.embedding(self.hashing(inputs["city"]))
        x = ops.concatenate([ops.cast(crossed, "float32"), embedded, inputs["price"]], axis=-1)
        x = self.cross(x)
        return {"rating": self.rating(x), "click": self.click(x)}


def multi_task_ranking() -> Program:
    model = Ranker()
    model.compile(
        optimizer=keras.optimizers.Ftrl(0.1),
        loss={"rating": "mse", "click": "binary_crossentropy"},
        loss_weights={"rating": 0.3, "click": 1.0},
        metrics={
            "rating": [keras.metrics.RootMeanSquaredError()],
            "click": [keras.metrics.AUC(name="auc")],
        },
    )
    cities = np.array(["berlin", "paris", "rome", "oslo"])[classes(ROWS, 4)]
    x = {
        "city": tf.constant(cities),
        "hour": tf.constant(classes(ROWS, 24, seed=2)),
        "price": rows(ROWS, 1),
    }
    y = {"rating": rows(ROWS, 1, seed=1), "click": classes(ROWS, 2, seed=3)[:, None]}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    return Program(model, dataset, batch_size=None)


class ListRanker(keras.Model):
    """Scores all items of a list; the loss compares them within each, where the label is known."""

    def __init__(self):
        super().__init__()
        self.users, self.items = layers.Embedding(USERS, WIDTH), layers.Embedding(ITEMS, WIDTH)
        self.score = keras.Sequential([layers.Dense(6, activation="relu"), layers.Dense(1)])

    def call(self, features):
        length = ops.shape(features["items"])[1]
        user = ops.repeat(self.users(features["user"])[:, None, :], length, axis=1)
        both = ops.concatenate([user, self.items(features["items"])], axis=2)
        return ops.squeeze(self.score(both), axis=-1)


class ListwiseLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        known = ops.cast(y_true >= 0, "float32")
        logits = y_pred - 1e3 * (1 - known)
        target = ops.softmax(y_true - 1e3 * (1 - known))
        return -ops.sum(target * ops.log_softmax(logits) * known, axis=-1)


def listwise_ranking() -> Program:
    model = ListRanker()
    model.compile(adam(), loss=ListwiseLoss())
    x = {"user": classes(ROWS, USERS), "items": padded(ROWS, 5, count=ITEMS)}
    y = np.where(x["items"] > 0, rng(4).integers(0, 5, (ROWS, 5)), -1).astype("float32")
    return Program(model, x, y)


PROGRAMS = (
    two_tower,
    matrix_factorisation,
    behaviour_sequence,
    multi_task_ranking,
    listwise_ranking,
)
