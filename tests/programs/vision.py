"""Programs on images: classes, segments, similarity, self-supervision, captchas, captions."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, images, padded, rng, rows, tokens
from tests.programs.text import Block, Decoder, TokenAndPosition

SIZE, PATCH, WIDTH = 8, 4, 8
COUNT = (SIZE // PATCH) ** 2


class Patches(layers.Layer):
    """Cuts images into patches."""

    def call(self, x):
        shape = ops.shape(x)
        patches = ops.image.extract_patches(x, size=PATCH)
        return ops.reshape(patches, (shape[0], COUNT, PATCH * PATCH * 3))


class PatchEncoder(layers.Layer):
    """Projects patches and adds a row of a table to each."""

    def __init__(self):
        super().__init__()
        self.projection = layers.Dense(WIDTH)
        self.position_embedding = layers.Embedding(COUNT, WIDTH)

    def call(self, patch):
        positions = ops.expand_dims(ops.arange(start=0, stop=COUNT, step=1), axis=0)
        return self.projection(patch) + self.position_embedding(positions)


def vision_transformer() -> Program:
    inputs = keras.Input((SIZE, SIZE, 3))
    augmented = keras.Sequential([layers.Normalization(mean=0.5, variance=0.1)])(inputs)
    x = PatchEncoder()(Patches()(augmented))
    x = Block()(x)
    logits = layers.Dense(4)(layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x)))
    model = keras.Model(inputs, logits)
    model.compile(
        keras.optimizers.AdamW(1e-2, weight_decay=1e-3, epsilon=1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(2, name="top-2-accuracy"),
        ],
    )
    return Program(model, images(ROWS), classes(ROWS, 4)[:, None])


class ClassToken(layers.Layer):
    """A learned token before the patches, and learned positions as plain weights."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.positions = self.add_weight(shape=(1, shape[1] + 1, shape[-1]), name="positions")

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, ops.shape(x)[-1]))
        return ops.concatenate([token, x], axis=1) + self.positions


def mobile_vit() -> Program:
    """Convolutions with inverted bottlenecks around attention over unfolded patches."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(2.0, offset=-1)(inputs)
    m = layers.Conv2D(8, 1, padding="same", use_bias=False)(x)
    m = layers.BatchNormalization(synchronized=True)(m)
    m = keras.activations.swish(m)
    m = layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=False)(m)
    m = layers.BatchNormalization(synchronized=True)(m)
    local = layers.Conv2D(WIDTH, 1, padding="same", activation="swish")(m)
    unfolded = layers.Reshape((4, 4, WIDTH))(local)
    folded = layers.Reshape((4, 4, WIDTH))(Block()(layers.Reshape((16, WIDTH))(unfolded)))
    x = layers.Concatenate(axis=-1)([m, folded])
    x = layers.GlobalAvgPool2D()(layers.Conv2D(6, 3, padding="same", activation="swish")(x))
    model = keras.Model(inputs, layers.Dense(4, activation="softmax")(x))
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    labels = keras.utils.to_categorical(classes(ROWS, 4), 4)
    return Program(model, images(ROWS), labels, rtol=1e-4)


def u_net() -> Program:
    """Segments, with a weight for each pixel and the mean intersection over union."""
    inputs = keras.Input((SIZE, SIZE, 3))
    down = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.SeparableConv2D(6, 3, padding="same")(layers.MaxPooling2D(2)(down))
    x = layers.BatchNormalization(synchronized=True)(x)
    x = layers.Activation("relu")(layers.Dropout(0.0)(x))
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Concatenate()([x, down])
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax", name="mask")(x))
    model.compile(
        adam(),
        "sparse_categorical_crossentropy",
        metrics=[keras.metrics.MeanIoU(3, sparse_y_pred=False, name="iou")],
        weighted_metrics=["accuracy"],
    )
    masks = rng(1).integers(0, 3, (ROWS, SIZE, SIZE))
    weights = rng(2).random((ROWS, SIZE, SIZE)).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((images(ROWS), masks, weights)).batch(5)
    return Program(model, dataset, batch_size=None, rtol=1e-4)


class CTCLayer(layers.Layer):
    """Computes its loss while the model trains, a number for each row, and returns predictions."""

    def call(self, y_true, y_pred):
        batch_len = ops.shape(y_true)[0]
        input_length = ops.full((batch_len,), ops.shape(y_pred)[1], dtype="int32")
        label_length = ops.full((batch_len,), ops.shape(y_true)[1], dtype="int32")
        loss = ops.ctc_loss(y_true, y_pred, label_length, input_length, mask_index=0)
        self.add_loss(ops.mean(loss))
        return ops.softmax(y_pred)


def captcha_reader() -> Program:
    """Labels are an input, and the loss is a layer: `compile` is given none."""
    input_img = layers.Input((8, 12, 1), name="image")
    labels = layers.Input((None,), name="label", dtype="int32")
    x = layers.Conv2D(4, 3, activation="relu", padding="same")(input_img)
    x = layers.MaxPooling2D((2, 2))(layers.Permute((2, 1, 3))(x))
    x = layers.Reshape((6, 16))(x)
    x = layers.Dense(8, activation="relu")(x)
    x = layers.Bidirectional(layers.SimpleRNN(5, return_sequences=True))(x)
    output = CTCLayer(name="ctc_loss")(labels, layers.Dense(6)(x))
    model = keras.Model([input_img, labels], output)
    model.compile(optimizer=adam())
    pictures = rng().random((ROWS, 8, 12, 1)).astype("float32")
    x = {"image": pictures, "label": tokens(ROWS, 2, count=6, seed=1)}
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(5)
    return Program(model, dataset, batch_size=None)


class TripletModel(keras.Model):
    """Learns distances between the embeddings of three images."""

    def __init__(self, margin: float = 0.5):
        super().__init__()
        self.margin = margin
        self.embedding = keras.Sequential(
            [
                keras.Input((SIZE, SIZE, 3)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(5),
            ]
        )
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        anchor, positive, negative = (self.embedding(x) for x in inputs)
        ap_distance = ops.sum(tf.square(anchor - positive), -1)
        an_distance = ops.sum(tf.square(anchor - negative), -1)
        return ap_distance, an_distance

    def _compute_loss(self, data):
        ap_distance, an_distance = self(data)
        return tf.maximum(ap_distance - an_distance + self.margin, 0.0)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self._compute_loss(data)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        self.loss_tracker.update_state(self._compute_loss(data))
        return {"loss": self.loss_tracker.result()}

    @property
    def metrics(self):
        return [self.loss_tracker]


def triplets() -> Program:
    model = TripletModel()
    model.compile(optimizer=adam(), weighted_metrics=[])
    three = tuple(images(ROWS, seed=seed) for seed in range(3))
    dataset = tf.data.Dataset.from_tensor_slices(three).batch(5)
    asked = dataset.map(lambda *images: (images,))
    return Program(model, dataset, batch_size=None, asked=asked)


class EmbeddingModel(keras.Model):
    """Tells each anchor's positive from those of the other anchors of the batch."""

    def train_step(self, data):
        if isinstance(data, tuple):
            data = data[0]
        anchors, positives = data[:, 0], data[:, 1]
        with tf.GradientTape() as tape:
            anchor_embeddings = self(anchors, training=True)
            positive_embeddings = self(positives, training=True)
            similarities = ops.einsum("ae,pe->ap", anchor_embeddings, positive_embeddings) / 0.2
            sparse_labels = keras.ops.arange(ops.shape(similarities)[0])
            loss = self.compute_loss(y=sparse_labels, y_pred=similarities)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(sparse_labels, similarities)
        return {m.name: m.result() for m in self.metrics}


def metric_learning() -> Program:
    inputs = layers.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(4, 3, strides=2, activation="relu")(inputs)
    x = layers.Dense(5, activation=None)(layers.GlobalAveragePooling2D()(x))
    model = EmbeddingModel(inputs, layers.UnitNormalization()(x))
    model.compile(
        optimizer=adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    pairs = images(ROWS * 2).reshape(ROWS, 2, SIZE, SIZE, 3)
    dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(5)
    return Program(model, dataset, batch_size=None, asked=images(ROWS), skip=("evaluate",))


def encoder_of(width: int = 6) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(4, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(width, use_bias=False, kernel_regularizer="l2"),
            layers.BatchNormalization(synchronized=True),
        ],
        name="encoder",
    )


class SimSiam(keras.Model):
    """Two views, a predictor, and gradients that stop; data are pairs of views."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder_of()
        self.predictor = keras.Sequential(
            [keras.Input((6,)), layers.Dense(3, activation="relu"), layers.Dense(6)]
        )
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, x):
        return self.encoder(x)

    @staticmethod
    def similarity(p, z):
        z = tf.stop_gradient(z)
        p, z = tf.math.l2_normalize(p, axis=1), tf.math.l2_normalize(z, axis=1)
        return -tf.reduce_mean(tf.reduce_sum(p * z, axis=1))

    def train_step(self, data):
        ds_one, ds_two = data
        with tf.GradientTape() as tape:
            z1, z2 = self.encoder(ds_one, training=True), self.encoder(ds_two, training=True)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            loss = self.similarity(p1, z2) / 2 + self.similarity(p2, z1) / 2
        params = self.encoder.trainable_variables + self.predictor.trainable_variables
        gradients = tape.gradient(loss, params)
        self.optimizer.apply_gradients(zip(gradients, params, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def two_views() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((images(ROWS), images(ROWS, seed=1))).batch(5)


def simsiam() -> Program:
    model = SimSiam()
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.6))
    return Program(
        model, two_views(), asked=images(ROWS), batch_size=None, skip=("evaluate",), rtol=1e-4
    )


class NearestNeighbourContrast(keras.Model):
    """NNCLR: positives are the nearest of a queue of past embeddings."""

    def __init__(self, queue_size: int = 12, width: int = 6, temperature: float = 0.3):
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder_of()
        self.projection_head = keras.Sequential([keras.Input((6,)), layers.Dense(width)])
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
        self.loss_tracker = keras.metrics.Mean(name="c_loss")
        start = rng(9).normal(size=(queue_size, width))
        self.feature_queue = keras.Variable(
            keras.utils.normalize(start, axis=1, order=2), trainable=False, dtype="float32"
        )

    @property
    def metrics(self):
        return [self.contrastive_accuracy, self.loss_tracker]

    def call(self, x):
        return self.projection_head(self.encoder(x))

    def nearest_neighbour(self, projections):
        similarities = ops.matmul(projections, ops.transpose(self.feature_queue))
        found = ops.take(self.feature_queue, ops.argmax(similarities, axis=1), axis=0)
        return projections + ops.stop_gradient(found - projections)

    def contrastive_loss(self, projections_1, projections_2):
        projections_1 = keras.utils.normalize(projections_1, axis=1, order=2)
        projections_2 = keras.utils.normalize(projections_2, axis=1, order=2)
        one_two = self.nearest_neighbour(projections_1) @ ops.transpose(projections_2)
        two_one = self.nearest_neighbour(projections_2) @ ops.transpose(projections_1)
        batch_size = ops.shape(projections_1)[0]
        labels = ops.arange(batch_size)
        both = ops.concatenate([one_two, two_one], axis=0) / self.temperature
        loss = keras.losses.sparse_categorical_crossentropy(
            ops.concatenate([labels, labels], axis=0), both, from_logits=True
        )
        self.contrastive_accuracy.update_state(labels, one_two)
        self.feature_queue.assign(
            ops.concatenate([projections_1, self.feature_queue[:-batch_size]], axis=0)
        )
        return loss

    def train_step(self, data):
        one, two = data
        with tf.GradientTape() as tape:
            projections = [self.projection_head(self.encoder(x, training=True)) for x in (one, two)]
            loss = self.contrastive_loss(*projections)
        weights = self.encoder.trainable_weights + self.projection_head.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {m.name: m.result() for m in self.metrics}


def nearest_neighbour_contrast() -> Program:
    model = NearestNeighbourContrast()
    model.compile(adam())
    return Program(
        model, two_views(), asked=images(ROWS), batch_size=None, skip=("evaluate",), rtol=1e-4
    )


class Distiller(keras.Model):
    """A student learns from a frozen teacher's softened answers."""

    def __init__(self, student, teacher):
        super().__init__()
        self.teacher, self.student = teacher, student

    def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn, temperature):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = distillation_loss_fn
        self.temperature = temperature

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False, training=True
    ):
        teacher_pred = self.teacher(x, training=False)
        student_loss = self.student_loss_fn(y, y_pred)
        distillation_loss = self.distillation_loss_fn(
            ops.softmax(teacher_pred / self.temperature, axis=1),
            ops.softmax(y_pred / self.temperature, axis=1),
        ) * (self.temperature**2)
        return 0.1 * student_loss + 0.9 * distillation_loss

    def call(self, x):
        return self.student(x)


def distillation() -> Program:
    def net(width: int) -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((SIZE, SIZE, 3)),
                layers.Conv2D(width, 3, strides=2),
                layers.LeakyReLU(negative_slope=0.2),
                layers.Flatten(),
                layers.Dense(4),
            ]
        )

    teacher = net(5)
    teacher.trainable = False
    model = Distiller(net(2), teacher)
    model.compile(
        adam(),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        student_loss_fn=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss_fn=keras.losses.KLDivergence(),
        temperature=4,
    )
    return Program(model, images(ROWS), classes(ROWS, 4))


class DualEncoder(keras.Model):
    """CLIP-like: images and captions of the batch against each other."""

    def __init__(self):
        super().__init__()
        self.text_encoder = keras.Sequential(
            [layers.Embedding(20, WIDTH), layers.GlobalAveragePooling1D(), layers.Dense(6)]
        )
        self.image_encoder = encoder_of()
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, features, training=False):
        with tf.device("/CPU:0"):
            captions = self.text_encoder(features["caption"], training=training)
        return captions, self.image_encoder(features["image"], training=training)

    def compute_loss(self, caption_embeddings, image_embeddings):
        logits = caption_embeddings @ ops.transpose(image_embeddings) / self.temperature
        images_similarity = image_embeddings @ ops.transpose(image_embeddings)
        captions_similarity = caption_embeddings @ ops.transpose(caption_embeddings)
        targets = keras.activations.softmax(captions_similarity + images_similarity)
        captions_loss = keras.losses.categorical_crossentropy(targets, logits, from_logits=True)
        images_loss = keras.losses.categorical_crossentropy(
            ops.transpose(targets), ops.transpose(logits), from_logits=True
        )
        return (captions_loss + images_loss) / 2

    def train_step(self, features):
        with tf.GradientTape() as tape:
            caption_embeddings, image_embeddings = self(features, training=True)
            loss = self.compute_loss(caption_embeddings, image_embeddings)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, features):
        caption_embeddings, image_embeddings = self(features, training=False)
        self.loss_tracker.update_state(self.compute_loss(caption_embeddings, image_embeddings))
        return {"loss": self.loss_tracker.result()}


def image_and_caption_pairs() -> Program:
    model = DualEncoder()
    model.compile(optimizer=keras.optimizers.AdamW(1e-2, weight_decay=1e-3, epsilon=1e-4))
    x = {"image": images(ROWS), "caption": tokens(ROWS, 5)}
    return Program(model, x, rtol=1e-4)


class Captioner(keras.Model):
    """Several captions an image, each a step of the loss; parts are plain layers and models."""

    def __init__(self):
        super().__init__()
        self.cnn_model = keras.Sequential(
            [keras.Input((SIZE, SIZE, 3)), layers.Conv2D(WIDTH, 4, 4), layers.Reshape((-1, WIDTH))]
        )
        self.encoder = Block()
        self.embedding = TokenAndPosition(5, 20, WIDTH)
        self.decoder = Decoder()
        self.out = layers.Dense(20, activation="softmax")
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.acc_tracker = keras.metrics.Mean(name="accuracy")

    @property
    def metrics(self):
        return [self.loss_tracker, self.acc_tracker]

    def call(self, inputs, training=False):
        features, words = inputs
        encoded = self.encoder(features, training=training)
        return self.out(self.decoder([self.embedding(words), encoded]))

    def losses_of(self, batch, training):
        batch_img, batch_seq = batch
        features = self.cnn_model(batch_img)
        batch_loss = batch_acc = 0
        for i in range(2):
            words, truth = batch_seq[:, i, :-1], batch_seq[:, i, 1:]
            mask = tf.math.not_equal(truth, 0)
            predicted = self([features, words], training=training)
            loss = self.loss(truth, predicted) * tf.cast(mask, "float32")
            batch_loss += tf.reduce_sum(loss) / tf.reduce_sum(tf.cast(mask, "float32"))
            right = tf.equal(tf.cast(truth, "int64"), tf.argmax(predicted, axis=2)) & mask
            batch_acc += tf.reduce_mean(tf.cast(right, "float32"))
        return batch_loss, batch_acc / 2

    def track(self, loss, acc):
        self.loss_tracker.update_state(loss)
        self.acc_tracker.update_state(acc)
        return {"loss": self.loss_tracker.result(), "acc": self.acc_tracker.result()}

    def train_step(self, batch_data):
        with tf.GradientTape() as tape:
            loss, acc = self.losses_of(batch_data, True)
        train_vars = self.trainable_variables
        grads = tape.gradient(loss, train_vars)
        self.optimizer.apply_gradients(zip(grads, train_vars, strict=True))
        return self.track(loss, acc)

    def test_step(self, batch_data):
        return self.track(*self.losses_of(batch_data, False))


def image_captioning() -> Program:
    model = Captioner()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=False, reduction=None)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    captions = padded(ROWS * 2, 6).reshape(ROWS, 2, 6)
    dataset = tf.data.Dataset.from_tensor_slices((images(ROWS), captions)).batch(5)
    return Program(model, dataset, batch_size=None, skip=("predict",))


class RetinaNetLoss(keras.losses.Loss):
    """Focal and box losses, normalised for each image by its number of positive anchors."""

    def call(self, y_true, y_pred):
        box_labels, box_predictions = y_true[:, :, :4], y_pred[:, :, :4]
        classes = tf.one_hot(tf.cast(y_true[:, :, 4], tf.int32), 3)
        positive = tf.cast(tf.greater(y_true[:, :, 4], -1.0), tf.float32)
        ignored = tf.cast(tf.equal(y_true[:, :, 4], -2.0), tf.float32)
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(classes, y_pred[:, :, 4:])
        probs = tf.nn.sigmoid(y_pred[:, :, 4:])
        pt = tf.where(tf.equal(classes, 1.0), probs, 1 - probs)
        clf_loss = tf.reduce_sum(tf.pow(1.0 - pt, 2.0) * cross_entropy, axis=-1)
        difference = tf.abs(box_labels - box_predictions)
        box_loss = tf.where(difference < 1.0, 0.5 * difference**2, difference - 0.5)
        box_loss = tf.reduce_sum(box_loss, axis=-1)
        clf_loss = tf.where(tf.equal(ignored, 1.0), 0.0, clf_loss)
        box_loss = tf.where(tf.equal(positive, 1.0), box_loss, 0.0)
        normalizer = tf.reduce_sum(positive, axis=-1)
        clf_loss = tf.math.divide_no_nan(tf.reduce_sum(clf_loss, axis=-1), normalizer)
        return clf_loss + tf.math.divide_no_nan(tf.reduce_sum(box_loss, axis=-1), normalizer)


class Detector(keras.Model):
    """Heads shared between the levels of a pyramid, their outputs put together."""

    def __init__(self):
        super().__init__()
        self.low = layers.Conv2D(6, 3, 2, "same", activation="relu")
        self.high = layers.Conv2D(6, 3, 2, "same", activation="relu")
        self.cls_head, self.box_head = (
            layers.Conv2D(3, 3, 1, "same"),
            layers.Conv2D(4, 3, 1, "same"),
        )

    def call(self, image, training=False):
        low = self.low(image)
        levels = [low, self.high(low)]
        n = tf.shape(image)[0]
        boxes = tf.concat([tf.reshape(self.box_head(x), [n, -1, 4]) for x in levels], axis=1)
        scores = tf.concat([tf.reshape(self.cls_head(x), [n, -1, 3]) for x in levels], axis=1)
        return tf.concat([boxes, scores], axis=-1)


def object_detection() -> Program:
    model = Detector()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.01, 0.05, 0.02])
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss=RetinaNetLoss())
    labels = rng(3).integers(-2, 3, (ROWS, 20, 1)).astype("float32")
    return Program(model, images(ROWS), np.concatenate([rows(ROWS, 20, 4), labels], axis=-1))


class Upscaler(keras.Model):
    """Super-resolution by residual blocks and pixel shuffling; `predict_step` rounds to bytes."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.compute_metrics(x, y, y_pred)

    def predict_step(self, x):
        images = x[0] if isinstance(x, tuple) else x
        return tf.cast(tf.round(tf.clip_by_value(self(images, training=False), 0, 255)), tf.uint8)


def psnr(high, super_resolution):
    return tf.image.psnr(high, super_resolution, max_val=255)[0]


def super_resolution() -> Program:
    inputs = layers.Input((None, None, 3))
    x = x_new = layers.Conv2D(6, 3, padding="same")(layers.Rescaling(scale=1.0 / 255)(inputs))
    x_new = layers.Conv2D(6, 3, padding="same", activation="relu")(x_new)
    x_new = layers.Add()([x_new, x])
    x = layers.Conv2D(12, 3, padding="same")(x_new)
    x = layers.Lambda(lambda t: tf.nn.depth_to_space(t, block_size=2))(x)
    model = Upscaler(inputs, layers.Rescaling(scale=255)(layers.Conv2D(3, 3, padding="same")(x)))
    model.compile(adam(1e-3), loss="mae", metrics=[psnr])
    low, high = images(ROWS, 4) * 255, images(ROWS, 8, seed=1) * 255
    return Program(model, low, high, skip=("evaluate",), rtol=1e-4)


PROGRAMS = (
    u_net,
    vision_transformer,
    mobile_vit,
    captcha_reader,
    triplets,
    metric_learning,
    simsiam,
    nearest_neighbour_contrast,
    distillation,
    image_and_caption_pairs,
    image_captioning,
    object_detection,
    super_resolution,
)
