"""Programs on graphs and point clouds."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, rng, rows

NODES, FEATURES, WIDTH = 12, 4, 6


def edges() -> np.ndarray:
    """Pairs of nodes, each node with itself among them."""
    pairs = rng(1).integers(0, NODES, (20, 2))
    return np.concatenate([pairs, np.stack([np.arange(NODES)] * 2, axis=1)]).astype("int32")


class GraphConvolution(layers.Layer):
    """Prepares messages, sums them up by node, updates the nodes."""

    def __init__(self):
        super().__init__()
        self.prepare = layers.Dense(WIDTH, activation="gelu")
        self.update = layers.Dense(WIDTH, activation="gelu")

    def call(self, inputs):
        nodes, links, weights = inputs
        messages = self.prepare(ops.take(nodes, links[:, 1], axis=0)) * weights[:, None]
        total = tf.math.unsorted_segment_sum(messages, links[:, 0], num_segments=NODES)
        joined = ops.concatenate([nodes, total], axis=1)
        return tf.math.l2_normalize(self.update(joined), axis=-1)


class NodeClassifier(keras.Model):
    """The graph is part of the model; a batch is ids of nodes."""

    def __init__(self, graph_info, num_classes: int = 3):
        super().__init__()
        node_features, links, edge_weights = graph_info
        self.node_features, self.links = node_features, links
        self.edge_weights = edge_weights / ops.sum(edge_weights)
        self.preprocess = layers.Dense(WIDTH)
        self.conv1, self.conv2 = GraphConvolution(), GraphConvolution()
        self.compute_logits = layers.Dense(num_classes)

    def call(self, input_node_indices):
        x = self.preprocess(self.node_features)
        x = self.conv1((x, self.links, self.edge_weights)) + x
        x = self.conv2((x, self.links, self.edge_weights)) + x
        embeddings = ops.take(x, ops.cast(input_node_indices, "int32"), axis=0)
        return self.compute_logits(embeddings)


def node_classification() -> Program:
    links = edges()
    graph = (tf.constant(rows(NODES, FEATURES)), tf.constant(links), ops.ones(len(links)))
    model = NodeClassifier(graph)
    model.compile(
        adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="acc")],
    )
    return Program(model, np.arange(ROWS) + 2, classes(ROWS, 3))


class GraphAttention(layers.Layer):
    """Each node attends to its neighbours; scores are normalised by node."""

    def __init__(self, units: int = WIDTH):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[0][-1], self.units), name="kernel")
        self.kernel_attention = self.add_weight(shape=(2 * self.units, 1), name="attention")

    def call(self, inputs):
        node_states, links = inputs
        transformed = ops.matmul(node_states, self.kernel)
        expanded = ops.reshape(tf.gather(transformed, links), (ops.shape(links)[0], -1))
        scores = ops.leaky_relu(ops.matmul(expanded, self.kernel_attention))
        scores = ops.exp(ops.clip(ops.squeeze(scores, -1), -2, 2))
        count = ops.shape(node_states)[0]
        sums = tf.math.unsorted_segment_sum(scores, links[:, 0], count)
        scores = scores / tf.gather(sums, links[:, 0])
        neighbours = tf.gather(transformed, links[:, 1]) * scores[:, None]
        return tf.math.unsorted_segment_sum(neighbours, links[:, 0], count)


class GraphAttentionNetwork(keras.Model):
    """Holds the graph, and classifies the nodes of a batch in steps of its own."""

    def __init__(self, node_states, links):
        super().__init__()
        self.node_states, self.links = node_states, links
        self.preprocess = layers.Dense(WIDTH, activation="relu")
        self.attention_layers = [GraphAttention(), GraphAttention()]
        self.output_layer = layers.Dense(3)

    def call(self, inputs):
        node_states, links = inputs
        x = self.preprocess(node_states)
        for layer in self.attention_layers:
            x = layer([x, links]) + x
        return self.output_layer(x)

    def answer(self, indices):
        return ops.take(self([self.node_states, self.links]), indices, axis=0)

    def train_step(self, data):
        indices, labels = data
        with tf.GradientTape() as tape:
            outputs = self.answer(indices)
            loss = self.compute_loss(y=labels, y_pred=outputs)
        grads = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        return self.compute_metrics(None, labels, outputs, None)

    def test_step(self, data):
        indices, labels = data
        outputs = self.answer(indices)
        self.compute_loss(y=labels, y_pred=outputs)
        return self.compute_metrics(None, labels, outputs, None)

    def predict_step(self, data):
        return ops.softmax(self.answer(data))


def graph_attention() -> Program:
    """Each step calls the model on nodes and edges, which have no rows in common."""
    model = GraphAttentionNetwork(tf.constant(rows(NODES, FEATURES)), tf.constant(edges()))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="acc")],
    )
    return Program(model, np.arange(ROWS) + 2, classes(ROWS, 3))


class MessagePassing(layers.Layer):
    """Molecules of different sizes, padded, with dense adjacency and a gated update."""

    def __init__(self, steps: int = 2):
        super().__init__()
        self.steps = steps
        self.message, self.update = layers.Dense(WIDTH), layers.GRUCell(WIDTH)

    def build(self, shape):
        self.update.build((None, WIDTH))

    def call(self, atoms, bonds, mask):
        count = ops.shape(atoms)[1]
        for _ in range(self.steps):
            messages = ops.matmul(bonds, self.message(atoms))
            flat = ops.reshape(messages, (-1, WIDTH))
            state, _ = self.update(flat, [ops.reshape(atoms, (-1, WIDTH))])
            atoms = ops.reshape(state, (-1, count, WIDTH)) * mask[..., None]
        return atoms


class Molecules(keras.Model):
    """Reads atoms and bonds as ragged tensors."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(9, WIDTH)
        self.passing = MessagePassing()
        self.readout = layers.MultiHeadAttention(2, 3)
        self.out = layers.Dense(1, activation="sigmoid")

    def call(self, inputs):
        atoms = inputs["atoms"].to_tensor()
        bonds = inputs["bonds"].to_tensor(shape=(None, None, None))
        mask = ops.cast(atoms > 0, "float32")
        x = self.passing(self.embed(atoms), bonds, mask)
        attended = self.readout(x, x, attention_mask=ops.cast(mask[:, None, :], "bool"))
        pooled = ops.sum(attended * mask[..., None], axis=1) / ops.sum(mask, axis=1, keepdims=True)
        return self.out(pooled)


def molecules() -> Program:
    model = Molecules()
    model.compile(adam(), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    sizes = [3, 5, 2, 4, 6, 1, 3]
    atoms = [list(rng(i).integers(1, 9, n)) for i, n in enumerate(sizes)]
    bonds = [rng(i + 20).random((n, n)).tolist() for i, n in enumerate(sizes)]
    x = {
        "atoms": tf.ragged.constant(atoms, dtype="int32"),
        "bonds": tf.ragged.constant(bonds, dtype="float32"),
    }
    dataset = tf.data.Dataset.from_tensor_slices((x, classes(ROWS, 2)[:, None]))
    return Program(model, dataset.ragged_batch(5), batch_size=None)


class OrthogonalRegularizer(keras.regularizers.Regularizer):
    """Asks that a transformation keep lengths; `row_by_row=False` multiplies all pairs of rows."""

    def __init__(self, num_features: int, l2reg: float = 0.01, *, row_by_row: bool = True):
        self.num_features, self.l2reg, self.row_by_row = num_features, l2reg, row_by_row
        self.eye = keras.ops.eye(num_features)

    def __call__(self, x):
        x = ops.reshape(x, (-1, self.num_features, self.num_features))
        if self.row_by_row:
            xxt = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        else:
            xxt = ops.tensordot(x, x, axes=(2, 2))
            xxt = ops.reshape(xxt, (-1, self.num_features, self.num_features))
        return ops.sum(self.l2reg * ops.square(xxt - self.eye))


def conv_bn(x, filters: int):
    x = layers.Conv1D(filters, kernel_size=1, padding="valid")(x)
    x = layers.BatchNormalization(momentum=0.0, synchronized=True)(x)
    return layers.Activation("relu")(x)


def point_net_with(regularizer: keras.regularizers.Regularizer) -> Program:
    inputs = keras.Input((10, 3))
    x = layers.GlobalMaxPooling1D()(conv_bn(inputs, 6))
    x = layers.Dense(
        9,
        kernel_initializer="random_normal",
        bias_initializer=keras.initializers.Constant(np.eye(3).flatten()),
        activity_regularizer=regularizer,
    )(x)
    x = layers.Dot(axes=(2, 1))([inputs, layers.Reshape((3, 3))(x)])
    x = layers.GlobalMaxPooling1D()(conv_bn(x, 6))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Dropout(0.0)(x)))
    model.compile(
        keras.optimizers.SGD(0.05),
        "sparse_categorical_crossentropy",
        metrics=["sparse_categorical_accuracy"],
    )
    return Program(model, rng().random((ROWS, 10, 3)), classes(ROWS, 3), rtol=1e-4)


def point_net() -> Program:
    return point_net_with(OrthogonalRegularizer(3))


def all_pairs_point_net() -> Program:
    """As widely copied: the regulariser multiplies each row's matrix with every other row's."""
    return point_net_with(OrthogonalRegularizer(3, row_by_row=False))


def node_embeddings() -> Program:
    """Skip-gram: dot products of target and context, with one table shared."""
    inputs = {
        "target": layers.Input((), dtype="int32", name="target"),
        "context": layers.Input((), dtype="int32", name="context"),
    }
    item_embeddings = layers.Embedding(NODES, WIDTH, name="item_embeddings")
    target, context = item_embeddings(inputs["target"]), item_embeddings(inputs["context"])
    logits = layers.Dot(axes=1, normalize=False, name="dot_similarity")([target, context])
    model = keras.Model(inputs, logits)
    model.compile(keras.optimizers.Adam(0.05), keras.losses.BinaryCrossentropy(from_logits=True))
    x = {"target": classes(ROWS, NODES), "context": classes(ROWS, NODES, seed=1)}
    y, weights = classes(ROWS, 2)[:, None], rng(2).random(ROWS).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(5)
    return Program(model, dataset, batch_size=None)


PROGRAMS = (
    node_classification,
    molecules,
    point_net,
    all_pairs_point_net,
    node_embeddings,
)
