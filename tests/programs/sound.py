"""Programs on sound: recognition of speech and of speakers."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, padded, rng, rows
from tests.programs.text import Block, Decoder, TokenAndPosition

VOCABULARY, WIDTH = 20, 8


class SpeechEmbedding(layers.Layer):
    """Shortens a spectrogram by convolutions."""

    def __init__(self):
        super().__init__()
        self.convolutions = [
            layers.Conv1D(WIDTH, 5, strides=2, padding="same", activation="relu") for _ in range(2)
        ]

    def call(self, x):
        for convolution in self.convolutions:
            x = convolution(x)
        return x


class SpeechTransformer(keras.Model):
    """Shifts and masks its targets in a step of its own."""

    def __init__(self):
        super().__init__()
        self.loss_metric = keras.metrics.Mean(name="loss")
        self.encoder = keras.Sequential([SpeechEmbedding(), Block()])
        self.embedding = TokenAndPosition(6, VOCABULARY, WIDTH)
        self.decoder = Decoder()
        self.classifier = layers.Dense(VOCABULARY)

    def call(self, inputs):
        source, target = inputs
        y = self.decoder([self.embedding(target), self.encoder(source)])
        return self.classifier(y)

    @property
    def metrics(self):
        return [self.loss_metric]

    def loss_of(self, batch):
        source, target = batch["source"], batch["target"]
        preds = self([source, target[:, :-1]])
        one_hot = ops.one_hot(target[:, 1:], VOCABULARY)
        mask = ops.logical_not(ops.equal(target[:, 1:], 0))
        return self.compute_loss(y=one_hot, y_pred=preds, sample_weight=mask)

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = self.loss_of(batch)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_metric.update_state(loss)
        return {"loss": self.loss_metric.result()}

    def test_step(self, batch):
        self.loss_metric.update_state(self.loss_of(batch))
        return {"loss": self.loss_metric.result()}


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises by a line, then falls by one."""

    def __call__(self, step):
        step = ops.cast(step, "float32")
        return ops.minimum(0.01 + 0.01 * step, 0.05 - 0.005 * step)


def speech_transformer() -> Program:
    model = SpeechTransformer()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(keras.optimizers.Adam(WarmUp(), epsilon=1e-4), loss)
    x = {"source": rows(ROWS, 12, 3), "target": padded(ROWS, 6)}
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(5)
    return Program(model, dataset, batch_size=None, skip=("predict",))


def ctc(y_true, y_pred):
    """A loss by rows, as given to `compile`."""
    batch_len = ops.shape(y_true)[0]
    input_length = ops.shape(y_pred)[1] * ops.ones(batch_len, dtype="int32")
    label_length = ops.shape(y_true)[1] * ops.ones(batch_len, dtype="int32")
    return ops.ctc_loss(y_true, y_pred, label_length, input_length, mask_index=0)


def speech_by_ctc() -> Program:
    """Convolutions and recurrent layers, with CTC as the loss of `compile`."""
    inputs = keras.Input((None, 6), name="input")
    x = layers.Reshape((-1, 6, 1))(inputs)
    x = layers.Conv2D(2, (3, 3), strides=(1, 2), padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(synchronized=True)(x))
    x = layers.Reshape((-1, 6))(x)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(x)
    model = keras.Model(inputs, layers.Dense(7)(x))
    model.compile(keras.optimizers.SGD(0.01), loss=ctc)
    labels = rng(1).integers(1, 7, (ROWS, 3)).astype("int32")
    return Program(model, rows(ROWS, 10, 6), labels, rtol=1e-4)


class Fourier(layers.Layer):
    """Amplitudes of a wave: complex numbers inside the model."""

    def call(self, audio):
        spectrum = tf.signal.fft(tf.cast(tf.squeeze(audio, axis=-1), tf.complex64))
        spectrum = tf.expand_dims(spectrum, axis=-1)
        return tf.math.abs(spectrum[:, : tf.shape(audio)[1] // 2, :])


def speaker_recognition() -> Program:
    inputs = keras.Input((16, 1), name="input")
    x = keras.layers.Lambda(lambda t: ops.reshape(t, (-1, 8, 1)))(Fourier()(inputs))
    skip = layers.Conv1D(4, 1, padding="same")(x)
    x = layers.Conv1D(4, 3, padding="same", activation="relu")(x)
    x = layers.MaxPool1D(2, 2)(layers.Activation("relu")(layers.Add()([x, skip])))
    x = layers.Flatten()(layers.AveragePooling1D(2, 2)(x))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax", name="output")(x))
    model.compile("Adamax", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Program(model, rows(ROWS, 16, 1), classes(ROWS, 3))


def spectrograms() -> Program:
    """Keras' own spectrogram layer, trainable, before convolutions."""
    inputs = keras.Input((64, 1))
    spectrum = layers.STFTSpectrogram(
        mode="log", frame_length=16, frame_step=8, fft_length=16, trainable=True
    )(inputs)
    x = layers.Conv1D(4, 3, activation="relu")(layers.LayerNormalization()(spectrum))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adam(), loss)
    waves = np.sin(np.arange(64) * (1 + rng().random((ROWS, 1)))).astype("float32")
    return Program(model, waves[..., None] + 0.1 * rows(ROWS, 64, 1), classes(ROWS, 3), rtol=1e-4)


PROGRAMS = (speech_transformer, speech_by_ctc, speaker_recognition, spectrograms)
