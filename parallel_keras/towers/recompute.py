"""Layers that are computed a second time, on the way back (`keras.RematScope`)."""

from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.towers.seeds import is_seed, tower_seed


class RecomputeScope(keras.StatelessScope):
    """Keeps what a layer assigns when it is computed again from being assigned.

    Where a tower's way back is its own, that belongs to the tower, and is merged with the rest.
    Here its state was merged before the loss was known.

    Args:
        tower: Int, the number of the tower.
    """

    def __init__(self, tower: int) -> None:
        super().__init__()
        self._tower = tower
        self._reading_outside = False

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value of a variable, `None` for the variable itself; seeds are the tower's."""
        value = super().get_current_value(variable)
        if value is not None or self._reading_outside or not is_seed(variable):
            return value
        self._reading_outside = True
        value = tower_seed(tf.convert_to_tensor(variable.value), tf.constant(self._tower))
        self._reading_outside = False
        return value

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Forgets the state of random numbers, which is the tower's own.

        Args:
            update: The variable and its new value.

        Raises:
            ValueError: For any other variable: it would be updated once, where one device
                updates it twice.
        """
        if not is_seed(update[0]):
            raise ValueError(
                f"Variable {update[0].path!r} is assigned by a layer that is computed again on "
                "the way back, after the towers' state was merged. Received: a loss over the "
                'merged batch. Use loss_on="towers", or take the layer out of the '
                "keras.RematScope."
            )


def values_are_known() -> bool:
    """Whether variables have their values now, and no stand-ins of a call that is symbolic."""
    scope = _compat.stateless_scope()
    return scope is None or isinstance(scope, RecomputeScope)
