"""Random streams: each tower draws from one of its own, derived from the generator's."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from parallel_keras import _compat

# What TensorFlow takes where an operation has a seed and there is no global one.
_NO_GLOBAL_SEED = 87654321


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
    derived = tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int64), tower)
    return tf.where(tf.equal(tower, 0), seed, tf.cast(derived, seed.dtype))


def started(value: tf.Tensor, variable: keras.Variable, tower: tf.Tensor | None) -> tf.Tensor:
    """What a tower starts with for a variable: the state of random numbers is its own.

    Args:
        value: Tensor, the value of the variable.
        variable: The variable.
        tower: Integer tensor of shape `()`, the number of the tower, `None` if there is one.

    Returns:
        A tensor like the value.
    """
    return tower_seed(value, tower) if tower is not None and is_seed(variable) else value


@contextlib.contextmanager
def stream_of(tower: int) -> Iterator[None]:
    """Inside, TensorFlow's own random operations draw from a tower's stream.

    They take a seed while they are traced, from the global one (`tf.random.set_seed`) and one
    of their own. The first tower keeps the global one, as in `tower_seed`.

    Args:
        tower: Int, the number of the tower.
    """
    if not tower:
        yield
    elif tf.executing_eagerly():
        with _compat.eager_seed(_folded(_compat.global_seed(), tower)):
            yield
    else:
        graph = tf.compat.v1.get_default_graph()
        before = graph.seed
        tf.compat.v1.set_random_seed(_folded(before, tower))
        try:
            yield
        finally:
            graph.seed = before


def _folded(seed: int | None, tower: int) -> int:
    base = _NO_GLOBAL_SEED if seed is None else int(seed)
    digest = hashlib.blake2b(f"{base} {tower}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % (2**31 - 1)
