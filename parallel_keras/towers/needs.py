"""What the towers of some models need and those of most do not, as their traces have shown."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import keras
import tensorflow as tf


class TraceAgain(BaseException):
    """A trace showed that the towers of this model need something, and must be traced with it.

    Not an `Exception`, which Keras would take for one of the model's own, and replace.

    Args:
        apart: Whether each tower needs a trace of its own.
        as_variables: Variables that must be read as variables.
        stand_ins: Variables that are assigned inside of a loop or a condition.
        no_xla: Whether XLA cannot compile them.
    """

    def __init__(
        self,
        *,
        apart: bool = False,
        as_variables: Sequence[keras.Variable] = (),
        stand_ins: Sequence[keras.Variable] = (),
        no_xla: bool = False,
    ) -> None:
        super().__init__("The towers are traced again.")
        self.apart = apart
        self.as_variables = list(as_variables)
        self.stand_ins = list(stand_ins)
        self.no_xla = no_xla


# By the id of a variable, for as long as it lives: what stands in for it on each device.
_STAND_INS: dict[int, dict[str, tf.Variable]] = {}


class Needs:
    """What the towers of a model need.

    Attributes:
        apart: Whether each tower needs a trace of its own.
        as_variables: The numbers of the variables that towers read themselves, instead of a
            copy of their value: something in the model looks for variables.
        stand_ins: The numbers of those that a variable on each tower's device stands in for.
    """

    def __init__(self) -> None:
        self.apart = False
        self.as_variables: set[int] = set()
        self.stand_ins: set[int] = set()

    def stand_in(
        self, device: str, index: int, variable: keras.Variable, value: tf.Tensor
    ) -> tf.Variable:
        """A variable on a device that has the value of another one at the start of a pass.

        Args:
            device: Name of the device, which is the current one.
            index: Int, the number of the variable.
            variable: The variable.
            value: Tensor, its value.

        Returns:
            The same `tf.Variable` each time.
        """
        del index
        # Kept for all towers of a model: a step may not make variables when it is traced again.
        if id(variable) not in _STAND_INS:
            _STAND_INS[id(variable)] = {}
            weakref.finalize(variable, _STAND_INS.pop, id(variable), None)
        made = _STAND_INS[id(variable)]
        if device not in made:
            with tf.init_scope(), tf.device(device):
                made[device] = tf.Variable(
                    tf.zeros(value.shape, value.dtype),
                    trainable=variable.trainable,
                    name=f"tower_{variable.name}",
                )
        made[device].assign(value)
        return made[device]
