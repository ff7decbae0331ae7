"""Programs that generate: autoencoders, adversarial nets, diffusion, flows."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import ROWS, Program, adam, classes, images, rows

LATENT = 3


class VariationalAutoencoder(keras.Model):
    """Draws its noise in a step of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inputs = keras.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
        x = layers.Dense(8, activation="relu")(layers.Flatten()(x))
        z_mean = layers.Dense(LATENT, name="z_mean")(x)
        z_log_var = layers.Dense(LATENT, name="z_log_var")(x)
        self.encoder = keras.Model(inputs, [z_mean, z_log_var], name="encoder")
        latent = keras.Input((LATENT,))
        x = layers.Reshape((4, 4, 2))(layers.Dense(32, activation="relu")(latent))
        x = layers.Conv2DTranspose(1, 3, activation="sigmoid", strides=2, padding="same")(x)
        self.decoder = keras.Model(latent, x, name="decoder")
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")
        self.seed_generator = keras.random.SeedGenerator(1337)

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def call(self, data):
        return self.decoder(self.encoder(data)[0])

    def train_step(self, data):
        with tf.GradientTape() as tape:
            z_mean, z_log_var = self.encoder(data)
            epsilon = keras.random.normal(ops.shape(z_mean), seed=self.seed_generator)
            z = z_mean + ops.exp(0.5 * z_log_var) * epsilon
            reconstruction = self.decoder(z)
            reconstruction_loss = ops.mean(
                ops.sum(keras.losses.binary_crossentropy(data, reconstruction), axis=(1, 2))
            )
            kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
            kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
        grads = tape.gradient(total_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(reconstruction_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {m.name: m.result() for m in self.metrics}


def variational_autoencoder() -> Program:
    model = VariationalAutoencoder()
    model.compile(optimizer=adam())
    return Program(model, images(ROWS, 8, 1), skip=("evaluate",))


class VectorQuantizer(layers.Layer):
    """Replaces vectors by the nearest of a codebook that gradients move."""

    def __init__(self, num_embeddings: int, embedding_dim: int, beta: float = 0.25):
        super().__init__()
        self.embedding_dim, self.num_embeddings, self.beta = embedding_dim, num_embeddings, beta
        self.embeddings = self.add_weight(
            shape=(embedding_dim, num_embeddings), initializer="random_uniform", name="codes"
        )

    def nearest(self, flattened):
        similarity = ops.matmul(flattened, self.embeddings)
        distances = (
            ops.sum(flattened**2, axis=1, keepdims=True)
            + ops.sum(self.embeddings**2, axis=0)
            - 2 * similarity
        )
        return ops.one_hot(ops.argmin(distances, axis=1), self.num_embeddings)

    def call(self, x):
        flattened = ops.reshape(x, (-1, self.embedding_dim))
        encodings = self.nearest(flattened)
        quantized = ops.matmul(encodings, ops.transpose(self.embeddings))
        quantized = ops.reshape(quantized, ops.shape(x))
        commitment = ops.mean((ops.stop_gradient(quantized) - x) ** 2)
        codebook = ops.mean((quantized - ops.stop_gradient(x)) ** 2)
        self.add_loss(self.beta * commitment + codebook)
        return x + ops.stop_gradient(quantized - x)


class MovingCodebook(VectorQuantizer):
    """The codes are moving means of the vectors that chose them."""

    def __init__(self, num_embeddings: int, embedding_dim: int, decay: float = 0.9):
        super().__init__(num_embeddings, embedding_dim)
        self.decay = decay
        self.embeddings.trainable = False
        self.counts = self.add_weight(
            shape=(num_embeddings,), initializer="ones", trainable=False, name="counts"
        )
        self.sums = self.add_weight(
            shape=(embedding_dim, num_embeddings), trainable=False, name="sums"
        )
        self.sums.assign(self.embeddings)

    def call(self, x, training=False):
        flattened = ops.reshape(x, (-1, self.embedding_dim))
        encodings = self.nearest(flattened)
        quantized = ops.matmul(encodings, ops.transpose(self.embeddings))
        quantized = ops.reshape(quantized, ops.shape(x))
        if training:
            self.counts.assign(self.decay * self.counts + 0.1 * ops.sum(encodings, axis=0))
            sums = ops.matmul(ops.transpose(flattened), encodings)
            self.sums.assign(self.decay * self.sums + 0.1 * sums)
            self.embeddings.assign(self.sums / (self.counts + 1e-5))
        self.add_loss(self.beta * ops.mean((ops.stop_gradient(quantized) - x) ** 2))
        return x + ops.stop_gradient(quantized - x)


class VectorQuantizedTrainer(keras.Model):
    """Trains with the variance of the data and all terms of its layers."""

    def __init__(self, quantizer: layers.Layer):
        super().__init__()
        self.train_variance = 0.08
        inputs = keras.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
        x = quantizer(layers.Conv2D(LATENT, 1)(x))
        x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
        self.vqvae = keras.Model(inputs, layers.Conv2DTranspose(1, 3, padding="same")(x))
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.vq_loss_tracker = keras.metrics.Mean(name="vq_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.vq_loss_tracker]

    def call(self, x):
        return self.vqvae(x)

    def train_step(self, x):
        with tf.GradientTape() as tape:
            reconstructions = self.vqvae(x, training=True)
            loss = tf.reduce_mean((x - reconstructions) ** 2) / self.train_variance
            total_loss = loss + sum(self.vqvae.losses)
        grads = tape.gradient(total_loss, self.vqvae.trainable_variables)
        self.optimizer.apply_gradients(zip(grads, self.vqvae.trainable_variables, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.vq_loss_tracker.update_state(sum(self.vqvae.losses))
        return {
            "loss": self.total_loss_tracker.result(),
            "vqvae_loss": self.vq_loss_tracker.result(),
        }


def vector_quantized_autoencoder() -> Program:
    model = VectorQuantizedTrainer(VectorQuantizer(6, LATENT))
    model.compile(optimizer=adam())
    return Program(model, images(ROWS, 8, 1), skip=("evaluate",))


def moving_codebook() -> Program:
    model = VectorQuantizedTrainer(MovingCodebook(6, LATENT))
    model.compile(optimizer=adam())
    return Program(model, images(ROWS, 8, 1), skip=("evaluate",))


class ConditionalGAN(keras.Model):
    """Classes go to both nets, to the discriminator as planes of the image."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.num_classes = num_classes
        self.discriminator = keras.Sequential(
            [
                keras.Input((8, 8, 1 + num_classes)),
                layers.Conv2D(6, 3, strides=2, padding="same"),
                layers.LeakyReLU(negative_slope=0.2),
                layers.GlobalMaxPooling2D(),
                layers.Dense(1),
            ],
            name="discriminator",
        )
        self.generator = keras.Sequential(
            [
                keras.Input((LATENT + num_classes,)),
                layers.Dense(16),
                layers.LeakyReLU(negative_slope=0.2),
                layers.Reshape((4, 4, 1)),
                layers.Conv2DTranspose(4, 4, strides=2, padding="same", activation="relu"),
                layers.Conv2D(1, 7, padding="same", activation="sigmoid"),
            ],
            name="generator",
        )
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.gen_loss_tracker = keras.metrics.Mean(name="generator_loss")
        self.disc_loss_tracker = keras.metrics.Mean(name="discriminator_loss")

    @property
    def metrics(self):
        return [self.gen_loss_tracker, self.disc_loss_tracker]

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def call(self, inputs):
        return self.generator(inputs)

    def train_step(self, data):
        real_images, one_hot_labels = data
        planes = ops.repeat(one_hot_labels[:, None, None], 8, axis=1)
        planes = ops.repeat(planes, 8, axis=2)
        batch_size = ops.shape(real_images)[0]
        noise = keras.random.normal((batch_size, LATENT), seed=self.seed_generator)
        generated = self.generator(ops.concatenate([noise, one_hot_labels], axis=1))
        fake = ops.concatenate([generated, planes], -1)
        real = ops.concatenate([real_images, planes], -1)
        combined = ops.concatenate([fake, real], axis=0)
        labels = ops.concatenate([ops.ones((batch_size, 1)), ops.zeros((batch_size, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(
            zip(grads, self.discriminator.trainable_weights, strict=True)
        )
        noise = keras.random.normal((batch_size, LATENT), seed=self.seed_generator)
        vectors = ops.concatenate([noise, one_hot_labels], axis=1)
        with tf.GradientTape() as tape:
            fake = ops.concatenate([self.generator(vectors), planes], -1)
            predictions = self.discriminator(fake)
            g_loss = self.loss_fn(ops.zeros((batch_size, 1)), predictions)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
        self.gen_loss_tracker.update_state(g_loss)
        self.disc_loss_tracker.update_state(d_loss)
        return {"g_loss": self.gen_loss_tracker.result(), "d_loss": self.disc_loss_tracker.result()}


def conditional_gan() -> Program:
    model = ConditionalGAN()
    model.compile(adam(), adam(5e-3), keras.losses.BinaryCrossentropy(from_logits=True))
    labels = keras.utils.to_categorical(classes(ROWS, 3), 3)
    dataset = tf.data.Dataset.from_tensor_slices((images(ROWS, 8, 1), labels)).batch(5)
    asked = np.concatenate([rows(ROWS, LATENT), labels], axis=1)
    return Program(model, dataset, batch_size=None, asked=asked, skip=("evaluate",))


class WassersteinGAN(keras.Model):
    """With a penalty on gradients between real and fake, and several steps of the critic."""

    def __init__(self, steps: int = 2, weight: float = 10.0):
        super().__init__()
        self.discriminator = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 5, strides=2, padding="same"),
                layers.LeakyReLU(0.2),
                layers.Flatten(),
                layers.Dense(1),
            ]
        )
        self.generator = keras.Sequential(
            [
                keras.Input((LATENT,)),
                layers.Dense(32, use_bias=False),
                layers.BatchNormalization(synchronized=True),
                layers.LeakyReLU(0.2),
                layers.Reshape((4, 4, 2)),
                layers.UpSampling2D(2),
                layers.Conv2D(1, 3, padding="same", activation="tanh"),
            ]
        )
        self.d_steps, self.gp_weight = steps, weight
        self.seed = keras.random.SeedGenerator(3)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def call(self, noise):
        return self.generator(noise)

    def gradient_penalty(self, batch_size, real_images, fake_images):
        alpha = keras.random.uniform([batch_size, 1, 1, 1], seed=self.seed)
        interpolated = real_images + alpha * (fake_images - real_images)
        with tf.GradientTape() as gp_tape:
            gp_tape.watch(interpolated)
            pred = self.discriminator(interpolated, training=True)
        grads = gp_tape.gradient(pred, [interpolated])[0]
        norm = tf.sqrt(tf.reduce_sum(tf.square(grads), axis=[1, 2, 3]))
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real_images):
        if isinstance(real_images, tuple):
            real_images = real_images[0]
        batch_size = tf.shape(real_images)[0]
        for _ in range(self.d_steps):
            noise = keras.random.normal((batch_size, LATENT), seed=self.seed)
            with tf.GradientTape() as tape:
                fake_images = self.generator(noise, training=True)
                fake = self.discriminator(fake_images, training=True)
                real = self.discriminator(real_images, training=True)
                d_cost = tf.reduce_mean(fake) - tf.reduce_mean(real)
                penalty = self.gradient_penalty(batch_size, real_images, fake_images)
                d_loss = d_cost + penalty * self.gp_weight
            d_gradient = tape.gradient(d_loss, self.discriminator.trainable_variables)
            self.d_optimizer.apply_gradients(
                zip(d_gradient, self.discriminator.trainable_variables, strict=True)
            )
        noise = keras.random.normal((batch_size, LATENT), seed=self.seed)
        with tf.GradientTape() as tape:
            generated = self.generator(noise, training=True)
            g_loss = -tf.reduce_mean(self.discriminator(generated, training=True))
        g_gradient = tape.gradient(g_loss, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(
            zip(g_gradient, self.generator.trainable_variables, strict=True)
        )
        return {"d_loss": d_loss, "g_loss": g_loss}


def wasserstein_gan() -> Program:
    model = WassersteinGAN()
    model.compile(adam(1e-3), adam(1e-3))
    return Program(
        model, images(ROWS, 8, 1), asked=rows(ROWS, LATENT), skip=("evaluate",), rtol=1e-4
    )


class CycleGAN(keras.Model):
    """Four nets, four optimizers, one persistent tape, spectral normalisation in the critics."""

    def __init__(self):
        super().__init__()

        def generator():
            inputs = keras.Input((8, 8, 1))
            x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
            return keras.Model(inputs, layers.Conv2D(1, 3, padding="same")(x))

        def critic():
            inputs = keras.Input((8, 8, 1))
            x = layers.SpectralNormalization(layers.Conv2D(3, 3, strides=2))(inputs)
            x = layers.SpectralNormalization(layers.Dense(1))(layers.Flatten()(x))
            return keras.Model(inputs, x)

        self.gen_g, self.gen_f = generator(), generator()
        self.disc_x, self.disc_y = critic(), critic()

    def compile(self, optimizers, **kwargs):
        super().compile(**kwargs)
        (
            self.gen_g_optimizer,
            self.gen_f_optimizer,
            self.disc_x_optimizer,
            self.disc_y_optimizer,
        ) = optimizers
        self.cycle_loss_fn = keras.losses.MeanAbsoluteError()
        self.adv_loss_fn = keras.losses.MeanSquaredError()

    def call(self, x):
        return self.gen_g(x)

    def train_step(self, batch_data):
        real_x, real_y = batch_data
        with tf.GradientTape(persistent=True) as tape:
            fake_y, fake_x = self.gen_g(real_x, training=True), self.gen_f(real_y, training=True)
            cycled_x, cycled_y = (
                self.gen_f(fake_y, training=True),
                self.gen_g(fake_x, training=True),
            )
            losses = []
            for generator, critic, real, fake, cycled in (
                (self.gen_g, self.disc_y, real_y, fake_y, cycled_y),
                (self.gen_f, self.disc_x, real_x, fake_x, cycled_x),
            ):
                judged_real, judged_fake = critic(real, training=True), critic(fake, training=True)
                g_loss = self.adv_loss_fn(ops.ones_like(judged_fake), judged_fake)
                g_loss += 10 * self.cycle_loss_fn(real, cycled)
                g_loss += 5 * self.cycle_loss_fn(real, generator(real, training=True))
                d_loss = self.adv_loss_fn(ops.ones_like(judged_real), judged_real)
                d_loss += self.adv_loss_fn(ops.zeros_like(judged_fake), judged_fake)
                losses += [g_loss, 0.5 * d_loss]
        nets = (self.gen_g, self.disc_y, self.gen_f, self.disc_x)
        optimizers = (
            self.gen_g_optimizer,
            self.disc_y_optimizer,
            self.gen_f_optimizer,
            self.disc_x_optimizer,
        )
        for loss, net, optimizer in zip(losses, nets, optimizers, strict=True):
            grads = tape.gradient(loss, net.trainable_variables)
            optimizer.apply_gradients(zip(grads, net.trainable_variables, strict=True))
        return dict(zip(("G_loss", "D_Y_loss", "F_loss", "D_X_loss"), losses, strict=True))


def cycle_gan() -> Program:
    model = CycleGAN()
    model.compile([keras.optimizers.Adam(2e-3, beta_1=0.5, epsilon=1e-4) for _ in range(4)])
    x, y = images(ROWS, 8, 1), images(ROWS, 8, 1, seed=1)
    dataset = tf.data.Dataset.zip(tuple(map(tf.data.Dataset.from_tensor_slices, (x, y))))
    return Program(model, dataset.batch(5), asked=x, batch_size=None, skip=("evaluate",), rtol=1e-4)


@keras.saving.register_keras_serializable(package="programs")
def sinusoidal_embedding(x):
    frequencies = ops.exp(ops.linspace(ops.log(1.0), ops.log(1000.0), 2))
    angular = ops.cast(2.0 * np.pi * frequencies, "float32")
    return ops.concatenate([ops.sin(angular * x), ops.cos(angular * x)], axis=3)


class DiffusionModel(keras.Model):
    """Denoises; a moving average of the weights makes the images."""

    def __init__(self):
        super().__init__()
        self.normalizer = layers.Normalization()
        self.network = self.get_network()
        self.ema_network = keras.models.clone_model(self.network)
        self.ema_network.set_weights(self.network.get_weights())
        self.seed_generator = keras.random.SeedGenerator(2)

    def get_network(self):
        noisy_images, noise_variances = keras.Input((8, 8, 1)), keras.Input((1, 1, 1))
        e = layers.Lambda(sinusoidal_embedding, output_shape=(1, 1, 4))(noise_variances)
        e = layers.UpSampling2D(size=8, interpolation="nearest")(e)
        x = layers.Concatenate()([layers.Conv2D(4, 1)(noisy_images), e])
        skip = layers.Conv2D(6, 3, padding="same", activation="swish")(x)
        x = layers.AveragePooling2D(2)(skip)
        x = layers.BatchNormalization(center=False, scale=False, synchronized=True)(x)
        x = layers.Conv2D(6, 3, padding="same", activation="swish")(x)
        x = layers.Concatenate()([layers.UpSampling2D(2, interpolation="bilinear")(x), skip])
        outputs = layers.Conv2D(1, 1, kernel_initializer="zeros")(x)
        return keras.Model([noisy_images, noise_variances], outputs)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
        self.image_loss_tracker = keras.metrics.Mean(name="i_loss")

    @property
    def metrics(self):
        return [self.noise_loss_tracker, self.image_loss_tracker]

    def diffusion_schedule(self, diffusion_times):
        start, end = ops.cast(ops.arccos(0.95), "float32"), ops.cast(ops.arccos(0.02), "float32")
        angles = start + diffusion_times * (end - start)
        return ops.sin(angles), ops.cos(angles)

    def denoise(self, noisy_images, noise_rates, signal_rates, training):
        network = self.network if training else self.ema_network
        pred_noises = network([noisy_images, noise_rates**2], training=training)
        return pred_noises, (noisy_images - noise_rates * pred_noises) / signal_rates

    def call(self, initial_noise):
        """Two steps of reverse diffusion."""
        count = ops.shape(initial_noise)[0]
        noisy_images = initial_noise
        for step in range(2):
            rates = self.diffusion_schedule(ops.ones((count, 1, 1, 1)) - step * 0.5)
            pred_noises, pred_images = self.denoise(noisy_images, *rates, training=False)
            noise_rates, signal_rates = self.diffusion_schedule(
                ops.ones((count, 1, 1, 1)) - (step + 1) * 0.5
            )
            noisy_images = signal_rates * pred_images + noise_rates * pred_noises
        return self.normalizer.mean + pred_images * self.normalizer.variance**0.5

    def noisy(self, images):
        images = self.normalizer(images, training=True)
        noises = keras.random.normal(ops.shape(images), seed=self.seed_generator)
        times = keras.random.uniform((ops.shape(images)[0], 1, 1, 1), seed=self.seed_generator)
        noise_rates, signal_rates = self.diffusion_schedule(times)
        return images, noises, noise_rates, signal_rates

    def train_step(self, images):
        images, noises, noise_rates, signal_rates = self.noisy(images)
        noisy_images = signal_rates * images + noise_rates * noises
        with tf.GradientTape() as tape:
            pred_noises, pred_images = self.denoise(
                noisy_images, noise_rates, signal_rates, training=True
            )
            noise_loss = self.loss(noises, pred_noises)
            image_loss = self.loss(images, pred_images)
        gradients = tape.gradient(noise_loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
        self.noise_loss_tracker.update_state(noise_loss)
        self.image_loss_tracker.update_state(image_loss)
        for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
            ema_weight.assign(0.9 * ema_weight + 0.1 * weight)
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, images):
        images, noises, noise_rates, signal_rates = self.noisy(images)
        noisy_images = signal_rates * images + noise_rates * noises
        pred_noises, pred_images = self.denoise(
            noisy_images, noise_rates, signal_rates, training=False
        )
        self.noise_loss_tracker.update_state(self.loss(noises, pred_noises))
        self.image_loss_tracker.update_state(self.loss(images, pred_images))
        return {m.name: m.result() for m in self.metrics}


def denoising_diffusion() -> Program:
    model = DiffusionModel()
    x = images(ROWS, 8, 1)
    model.normalizer.adapt(x)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3, weight_decay=1e-4, epsilon=1e-4),
        loss=keras.losses.mean_absolute_error,
    )
    # A loss by rows, as the function gives: the tape adds it up.
    return Program(model, x, asked=rows(ROWS, 8, 8, 1), rtol=1e-4)


class RealNVP(keras.Model):
    """A flow of coupling layers, trained by likelihood."""

    def __init__(self, num_coupling_layers: int = 4):
        super().__init__()
        self.num_coupling_layers = num_coupling_layers
        self.masks = np.array([[0, 1], [1, 0]] * (num_coupling_layers // 2), dtype="float32")
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.layers_list = [self.coupling() for _ in range(num_coupling_layers)]

    @staticmethod
    def coupling():
        inputs = keras.Input((2,))
        heads = []
        for activation in ("tanh", "linear"):
            x = layers.Dense(6, "relu", kernel_regularizer=keras.regularizers.l2(0.01))(inputs)
            heads.append(layers.Dense(2, activation)(x))
        return keras.Model(inputs, heads)

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, x, training=True):
        log_det_inv = 0
        direction = -1 if training else 1
        for i in range(self.num_coupling_layers)[::direction]:
            x_masked = x * self.masks[i]
            reversed_mask = 1 - self.masks[i]
            s, t = self.layers_list[i](x_masked)
            s, t = s * reversed_mask, t * reversed_mask
            gate = (direction - 1) / 2
            x = (
                reversed_mask * (x * ops.exp(direction * s) + direction * t * ops.exp(gate * s))
                + x_masked
            )
            log_det_inv += gate * ops.sum(s, axis=1)
        return x, log_det_inv

    def log_loss(self, x):
        y, logdet = self(x)
        log_likelihood = -0.5 * ops.sum(y**2, axis=-1) - np.log(2 * np.pi) + logdet
        return -ops.mean(log_likelihood)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.log_loss(data)
        g = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(g, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        self.loss_tracker.update_state(self.log_loss(data))
        return {"loss": self.loss_tracker.result()}


def real_nvp() -> Program:
    model = RealNVP()
    model.compile(optimizer=adam(1e-3))
    return Program(model, rows(ROWS, 2))


class MaskedConvolution(layers.Layer):
    """Sees pixels above and to the left only: the kernel is masked by assigning it."""

    def __init__(self, mask_type: str, **kwargs):
        super().__init__()
        self.mask_type = mask_type
        self.conv = layers.Conv2D(**kwargs)

    def build(self, input_shape):
        self.conv.build(input_shape)
        shape = ops.shape(self.conv.kernel)
        self.mask = np.zeros(shape, dtype="float32")
        self.mask[: shape[0] // 2, ...] = 1.0
        self.mask[shape[0] // 2, : shape[1] // 2, ...] = 1.0
        if self.mask_type == "B":
            self.mask[shape[0] // 2, shape[1] // 2, ...] = 1.0

    def call(self, inputs):
        self.conv.kernel.assign(self.conv.kernel * self.mask)
        return self.conv(inputs)


def pixel_cnn() -> Program:
    inputs = keras.Input((8, 8, 1))
    x = MaskedConvolution("A", filters=4, kernel_size=5, activation="relu", padding="same")(inputs)
    residual = layers.Conv2D(4, 1, activation="relu")(x)
    residual = MaskedConvolution("B", filters=4, kernel_size=3, padding="same")(residual)
    x = layers.add([x, residual])
    x = MaskedConvolution("B", filters=4, kernel_size=1, activation="relu")(x)
    model = keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))
    model.compile(adam(), "binary_crossentropy")
    x = (images(ROWS, 8, 1) > 0.5).astype("float32")
    return Program(model, x, x)


def sparse_autoencoder() -> Program:
    """Few units at a time, by an L1 on activations, which Keras divides by the batch size."""
    inputs = keras.Input((12,))
    encoded = layers.Dense(6, activation="relu", activity_regularizer=keras.regularizers.L1(1e-2))
    model = keras.Model(inputs, layers.Dense(12, activation="sigmoid")(encoded(inputs)))
    model.compile(adam(), "binary_crossentropy")
    x = images(ROWS, 2)
    return Program(model, x.reshape(ROWS, 12), x.reshape(ROWS, 12))


class MeanActivity(keras.regularizers.Regularizer):
    """The divergence from a wished mean activity, which is a mean over rows."""

    def __call__(self, x):
        mean = ops.clip(ops.mean(x, axis=0), 1e-6, 1 - 1e-6)
        wished = 0.1
        return 0.1 * ops.sum(
            wished * ops.log(wished / mean) + (1 - wished) * ops.log((1 - wished) / (1 - mean))
        )


def mean_activity_autoencoder() -> Program:
    inputs = keras.Input((12,))
    encoded = layers.Dense(6, activation="sigmoid", activity_regularizer=MeanActivity())
    model = keras.Model(inputs, layers.Dense(12, activation="sigmoid")(encoded(inputs)))
    model.compile(adam(), "binary_crossentropy")
    x = images(ROWS, 2)
    return Program(model, x.reshape(ROWS, 12), x.reshape(ROWS, 12))


PROGRAMS = (
    variational_autoencoder,
    vector_quantized_autoencoder,
    moving_codebook,
    conditional_gan,
    wasserstein_gan,
    cycle_gan,
    denoising_diffusion,
    real_nvp,
    pixel_cnn,
    sparse_autoencoder,
    mean_activity_autoencoder,
)
