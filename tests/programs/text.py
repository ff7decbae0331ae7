"""Programs on text: language models, translation, tagging, classification."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, padded, rng, rows, tokens

VOCABULARY, LENGTH, WIDTH = 20, 6, 8


class TokenAndPosition(layers.Layer):
    """Embeds tokens, and adds a row of a table for each position."""

    def __init__(self, length: int = LENGTH, vocabulary: int = VOCABULARY, width: int = WIDTH):
        super().__init__()
        self.token = layers.Embedding(vocabulary, width)
        self.position = layers.Embedding(length, width)

    def call(self, x):
        positions = ops.arange(0, ops.shape(x)[-1], 1)
        return self.token(x) + self.position(positions)


class Block(layers.Layer):
    """Attention and a feed-forward net, causal or not."""

    def __init__(self, width: int = WIDTH, heads: int = 2, causal: bool = False):
        super().__init__()
        self.supports_masking = True
        self.causal = causal
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.feed_forward = keras.Sequential(
            [layers.Dense(2 * width, activation="gelu"), layers.Dense(width)]
        )
        self.norm1 = layers.LayerNormalization(epsilon=1e-6)
        self.norm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout = layers.Dropout(0.0)

    def causal_mask(self, x):
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        i = ops.arange(length)[:, None]
        mask = ops.cast(i >= ops.arange(length), "bool")
        return ops.tile(ops.expand_dims(mask, 0), [batch, 1, 1])

    def call(self, x, training=None):
        mask = self.causal_mask(x) if self.causal else None
        attended = self.attention(x, x, attention_mask=mask)
        x = self.norm1(x + self.dropout(attended, training=training))
        return self.norm2(x + self.dropout(self.feed_forward(x), training=training))


def mini_gpt() -> Program:
    """A causal language model with a table of positions; the second output has no loss."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = TokenAndPosition()(inputs)
    x = Block(causal=True)(x)
    model = keras.Model(inputs, [layers.Dense(VOCABULARY)(x), x])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adam(), loss=[loss, None])
    ids = tokens(ROWS, LENGTH + 1)
    return Program(model, ids[:, :-1], ids[:, 1:])


class PositionalEmbedding(layers.Layer):
    """Embeds padded tokens and hands their mask on."""

    def __init__(self):
        super().__init__()
        self.token = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
        self.position = layers.Embedding(LENGTH, WIDTH)

    def call(self, inputs):
        positions = tf.range(0, tf.shape(inputs)[-1], 1)
        return self.token(inputs) + self.position(positions)

    def compute_mask(self, inputs, mask=None):
        return ops.not_equal(inputs, 0)


class Decoder(layers.Layer):
    """Attends to itself, causally, and to what was encoded, where that is no padding."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.own = layers.MultiHeadAttention(2, 4)
        self.cross = layers.MultiHeadAttention(2, 4)
        self.feed_forward = layers.Dense(WIDTH, activation="relu")
        self.norms = [layers.LayerNormalization() for _ in range(3)]

    def call(self, inputs, mask=None):
        x, encoded = inputs
        x_mask, encoded_mask = (None, None) if mask is None else mask
        x = self.norms[0](x + self.own(x, x, query_mask=x_mask, use_causal_mask=True))
        attended = self.cross(x, encoded, query_mask=x_mask, key_mask=encoded_mask)
        x = self.norms[1](x + attended)
        return self.norms[2](x + self.feed_forward(x))


def translation() -> Program:
    """A Transformer from padded sentences to padded sentences, with masked accuracy."""
    source = keras.Input((None,), dtype="int64", name="encoder_inputs")
    encoded = Block()(PositionalEmbedding()(source))
    target = keras.Input((None,), dtype="int64", name="decoder_inputs")
    x = Decoder()([PositionalEmbedding()(target), encoded])
    outputs = layers.Dense(VOCABULARY, activation="softmax")(layers.Dropout(0.0)(x))
    model = keras.Model([source, target], outputs)
    model.compile(
        adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy(3)],
    )
    decoded = padded(ROWS, LENGTH + 1, seed=3)
    x = {"encoder_inputs": padded(ROWS, LENGTH), "decoder_inputs": decoded[:, :-1]}
    dataset = tf.data.Dataset.from_tensor_slices((x, decoded[:, 1:])).batch(5).prefetch(1)
    return Program(model, dataset, batch_size=None)


class MaskedLanguageModel(keras.Model):
    """BERT's first task in a step of its own, with weights where a token is hidden."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_fn = keras.losses.SparseCategoricalCrossentropy(reduction=None)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def train_step(self, inputs):
        if len(inputs) == 3:
            features, labels, sample_weight = inputs
        else:
            features, labels = inputs
            sample_weight = None
        with tf.GradientTape() as tape:
            predictions = self(features, training=True)
            loss = self.loss_fn(labels, predictions, sample_weight=sample_weight)
        trainable_vars = self.trainable_variables
        gradients = tape.gradient(loss, trainable_vars)
        self.optimizer.apply_gradients(zip(gradients, trainable_vars, strict=True))
        self.loss_tracker.update_state(loss, sample_weight=sample_weight)
        return {"loss": self.loss_tracker.result()}

    @property
    def metrics(self):
        return [self.loss_tracker]


def sinusoids(length: int, width: int) -> np.ndarray:
    angles = np.arange(length)[:, None] / np.power(1e4, (np.arange(width) // 2 * 2) / width)
    return np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles)).astype("float32")


def masked_language_model() -> Program:
    inputs = layers.Input((LENGTH,), dtype="int64")
    x = layers.Embedding(VOCABULARY, WIDTH, name="word_embedding")(inputs)
    x = x + ops.convert_to_tensor(sinusoids(LENGTH, WIDTH))
    x = Block()(x)
    model = MaskedLanguageModel(
        inputs, layers.Dense(VOCABULARY, activation="softmax", name="mlm_cls")(x)
    )
    model.compile(optimizer=adam())
    ids = tokens(ROWS, LENGTH)
    hidden = rng(2).random((ROWS, LENGTH)) < 0.4
    hidden[:, 0] = True
    dataset = tf.data.Dataset.from_tensor_slices(
        (np.where(hidden, VOCABULARY - 1, ids), ids, hidden.astype("float32"))
    )
    return Program(model, dataset.batch(5), batch_size=None, asked=ids, skip=("evaluate",))


class Tagger(keras.Model):
    """Names entities: padding tokens are left out of a loss written by hand."""

    def __init__(self, tags: int):
        super().__init__()
        self.embedding = TokenAndPosition()
        self.block = Block()
        self.dropout1 = layers.Dropout(0.0)
        self.classifier = layers.Dense(tags, activation="softmax")

    def call(self, inputs, training=False):
        x = self.block(self.embedding(inputs))
        return self.classifier(self.dropout1(x, training=training))


class NonPaddingTokenLoss(keras.losses.Loss):
    """The mean over tokens that are no padding, over all rows together."""

    def call(self, y_true, y_pred):
        loss = keras.losses.SparseCategoricalCrossentropy(reduction=None)(y_true, y_pred)
        mask = ops.cast(y_true > 0, "float32")
        return ops.sum(loss * mask) / ops.sum(mask)


def named_entities() -> Program:
    model = Tagger(4)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss=NonPaddingTokenLoss())
    return Program(model, tokens(ROWS, LENGTH), padded(ROWS, LENGTH, count=4))


REVIEWS = np.array(
    [
        "the film was good",
        "a bad film",
        "good good acting",
        "the worst of the year",
        "not bad at all",
        "the acting was not good",
        "film of the year",
    ]
)


def text_classification() -> Program:
    """Strings go into the model, which vectorises them."""
    vectorize = layers.TextVectorization(VOCABULARY, output_sequence_length=LENGTH)
    vectorize.adapt(REVIEWS)
    model = keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            vectorize,
            layers.Embedding(VOCABULARY, WIDTH),
            layers.Conv1D(6, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling1D(),
            layers.Dense(1, activation="sigmoid", name="predictions"),
        ]
    )
    model.compile(adam(), "binary_crossentropy", metrics=["accuracy", keras.metrics.AUC(name="a")])
    x = tf.constant(REVIEWS)[:, None]
    return Program(model, x, classes(ROWS, 2)[:, None])


def bidirectional_lstm() -> Program:
    """Classifies sequences with padding by recurrent layers under a mask."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(x)
    x = layers.Bidirectional(layers.LSTM(4))(x)
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
    model.compile("rmsprop", "binary_crossentropy", metrics=["accuracy"])
    return Program(model, padded(ROWS, LENGTH), classes(ROWS, 2)[:, None])


def sequence_to_sequence() -> Program:
    """An LSTM whose states start another one, by characters in one-hot form."""
    encoder_inputs = keras.Input((None, 5))
    _, state_h, state_c = layers.LSTM(6, return_state=True)(encoder_inputs)
    decoder_inputs = keras.Input((None, 5))
    x, _, _ = layers.LSTM(6, return_sequences=True, return_state=True)(
        decoder_inputs, initial_state=[state_h, state_c]
    )
    model = keras.Model([encoder_inputs, decoder_inputs], layers.Dense(5, activation="softmax")(x))
    model.compile("rmsprop", "categorical_crossentropy", metrics=["accuracy"])
    one_hot = keras.utils.to_categorical
    x = [one_hot(tokens(ROWS, 4, count=5), 5), one_hot(tokens(ROWS, 3, count=5, seed=1), 5)]
    return Program(model, x, one_hot(tokens(ROWS, 3, count=5, seed=2), 5))


def span_extraction() -> Program:
    """Answers questions by the start and the end of a span: two outputs over positions."""
    inputs = {
        "input_ids": layers.Input((LENGTH,), dtype="int32", name="input_ids"),
        "token_type_ids": layers.Input((LENGTH,), dtype="int32", name="token_type_ids"),
    }
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs["input_ids"])
    x = x + layers.Embedding(2, WIDTH)(inputs["token_type_ids"])
    x = Block()(x)
    outputs = []
    for name in ("start", "end"):
        logits = layers.Flatten()(layers.Dense(1, use_bias=False, name=f"{name}_logit")(x))
        outputs.append(layers.Activation("softmax", name=name)(logits))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=False)
    model.compile(adam(), loss=[loss, loss])
    x = {
        "input_ids": tokens(ROWS, LENGTH),
        "token_type_ids": tokens(ROWS, LENGTH, count=2, lowest=0, seed=1),
    }
    return Program(model, x, [classes(ROWS, LENGTH), classes(ROWS, LENGTH, seed=6)])


class Router(layers.Layer):
    """Sends each token to one expert; with a load-balancing loss over all tokens it sees."""

    def __init__(self, experts: int, balance: float):
        super().__init__()
        self.experts, self.balance = experts, balance
        self.route = layers.Dense(experts)

    def call(self, inputs, training=False):
        probability = ops.softmax(self.route(inputs), axis=-1)
        gate = ops.max(probability, axis=-1)
        chosen = ops.one_hot(ops.argmax(probability, axis=-1), self.experts)
        if self.balance:
            density = ops.mean(chosen, axis=[0, 1])
            proxy = ops.mean(probability, axis=[0, 1])
            self.add_loss(self.balance * ops.mean(density * proxy) * self.experts**2)
        return chosen * gate[..., None], probability


class Switch(layers.Layer):
    """A feed-forward net of which each token sees one expert's."""

    def __init__(self, experts: int = 3, balance: float = 0.0):
        super().__init__()
        self.experts = [layers.Dense(WIDTH, activation="relu") for _ in range(experts)]
        self.router = Router(experts, balance)

    def call(self, inputs, training=False):
        combine, probability = self.router(inputs)
        outputs = ops.stack([expert(inputs) for expert in self.experts], axis=-1)
        return ops.einsum("blwe,ble->blw", outputs, combine), probability


def switch_transformer_with(balance: float) -> tuple[keras.Model, Any]:
    inputs = layers.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    attended = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(x + attended)
    switched, probability = Switch(balance=balance)(x)
    x = layers.LayerNormalization()(x + switched)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x)), probability


def switch_transformer() -> Program:
    """Balances its load in a layer: a product of means over the rows that the layer sees."""
    model, _ = switch_transformer_with(0.1)
    model.compile(adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Program(model, tokens(ROWS, LENGTH), classes(ROWS, 2))


class BalancedOutside(keras.Model):
    """Balances the load in `compute_loss`, which sees the whole batch."""

    def __init__(self, inner: keras.Model):
        super().__init__()
        self.inner = inner
        self.balance_tracker = keras.metrics.Mean(name="balance")

    def call(self, x, training=None):
        return self.inner(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        answer, probability = y_pred
        loss = super().compute_loss(x, y, answer, sample_weight, training)
        experts = ops.shape(probability)[-1]
        chosen = ops.one_hot(ops.argmax(probability, axis=-1), experts)
        share = ops.mean(chosen, axis=[0, 1]) * ops.mean(probability, axis=[0, 1])
        balance = 0.1 * ops.mean(share) * experts**2
        self.balance_tracker.update_state(balance)
        return loss + balance

    @property
    def metrics(self):
        return [*super().metrics, self.balance_tracker]


def mixture_of_experts() -> Program:
    inner, probability = switch_transformer_with(0.0)
    model = BalancedOutside(keras.Model(inner.input, [inner.output, probability]))
    model.compile(adam(), "sparse_categorical_crossentropy")
    return Program(model, tokens(ROWS, LENGTH), classes(ROWS, 2))


class Classifier(keras.Model):
    """Takes bytes from 0 to 255 and strings for classes, and prepares them in its own methods."""

    names = ("bad", "good")

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="tanh")
        self.score = layers.Dense(2, activation="softmax")

    def call(self, x):
        return self.score(self.hidden(x))

    def preprocess(self, x, y=None):
        x = np.asarray(x, "float32") / 255
        return x if y is None else (x, np.array([self.names.index(name) for name in y]))

    def fit(self, x, y, **kwargs):
        x, y = self.preprocess(x, y)
        return super().fit(x, y, **kwargs)

    def evaluate(self, x, y, **kwargs):
        x, y = self.preprocess(x, y)
        return super().evaluate(x, y, **kwargs)

    def predict(self, x, **kwargs):
        return super().predict(self.preprocess(x), **kwargs)


def methods_that_prepare() -> Program:
    """`fit`, `evaluate` and `predict` are the model's own."""
    model = Classifier()
    model.compile(adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    x = tokens(ROWS, 4, count=255).astype("uint8")
    return Program(model, x, [Classifier.names[i] for i in classes(ROWS, 2)])


def recurrent_attention() -> Program:
    """A cell of one's own with attention over memory, in `keras.layers.RNN`."""

    class Cell(layers.Layer):
        def __init__(self, units: int):
            super().__init__()
            self.units = self.state_size = self.output_size = units
            self.gate = layers.Dense(units, activation="sigmoid")
            self.update = layers.Dense(units, activation="tanh")
            self.memory = self.add_weight(shape=(4, units), name="memory")

        def build(self, shape):
            self.gate.build((shape[0], shape[-1] + self.units))
            self.update.build((shape[0], shape[-1] + self.units))

        def call(self, inputs, states):
            joined = ops.concatenate([inputs, states[0]], axis=-1)
            gate = self.gate(joined)
            looked_up = ops.softmax(states[0] @ ops.transpose(self.memory)) @ self.memory
            state = gate * states[0] + (1 - gate) * self.update(joined) + 0.1 * looked_up
            return state, [state]

    model = keras.Sequential(
        [keras.Input((None, 3)), layers.RNN(Cell(5), return_sequences=True), layers.Dense(1)]
    )
    model.compile(adam(), "mse")
    return Program(model, rows(ROWS, 5, 3), rows(ROWS, 5, 1, seed=1))


PROGRAMS = (
    mini_gpt,
    translation,
    masked_language_model,
    named_entities,
    text_classification,
    bidirectional_lstm,
    sequence_to_sequence,
    span_extraction,
    mixture_of_experts,
    methods_that_prepare,
    recurrent_attention,
)
