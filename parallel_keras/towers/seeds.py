"""Random streams: each tower draws from one of its own, derived from the generator's."""

import keras
import tensorflow as tf


def is_seed(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a `keras.random.SeedGenerator`."""
    return variable.name == "seed_generator_state" and tuple(variable.shape) == (2,)


def tower_seed(seed: tf.Tensor, tower: tf.Tensor) -> tf.Tensor:
    """The state that a tower draws from, derived from the generator's.

    The first tower keeps the state itself, so that one tower draws what the
    bare model draws and the state after the step is the one it would have.

    Args:
        seed: Integer tensor of shape `(2,)`.
        tower: Integer tensor of shape `()`, the number of the tower.

    Returns:
        A tensor like `seed`.
    """
    own = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int64), tower)
    return tf.where(tf.equal(tower, 0), seed, tf.cast(own, seed.dtype))
