"""Weight regularisers: computed where their weights live, so that only numbers travel."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras.homes.plan import Homes


@dataclasses.dataclass(frozen=True)
class Penalty:
    """The regulariser of one weight.

    Attributes:
        variable: The weight.
        value: Tensor `()`, on the weight's home.
        tape: What leads from the weight to it.
        home: That device.
    """

    variable: keras.Variable
    value: tf.Tensor
    tape: tf.GradientTape
    home: str

    @classmethod
    def of(cls, variable: keras.Variable, regularizer: Callable[[Any], Any], home: str) -> Penalty:
        """Computes it."""
        with tf.device(home or None), tf.GradientTape() as tape:
            value = tf.convert_to_tensor(regularizer(variable))
        return cls(variable, value, tape, home)

    def gradient(self, upstream: tf.Tensor | None) -> Any:
        """The gradient of the weight, on its home.

        Args:
            upstream: The gradient of the value, `None` for 1.
        """
        up = None if upstream is None else tf.cast(upstream, self.value.dtype)
        with tf.device(self.home or None):
            return self.tape.gradient(self.value, self.variable.value, output_gradients=up)


def penalties(variables: Sequence[keras.Variable], homes: Homes) -> dict[int, Penalty]:
    """The regularisers of those of the weights that have one, by their index."""
    return {
        index: Penalty.of(variable, variable.regularizer, homes.of(variable))
        for index, variable in enumerate(variables)
        if variable.regularizer is not None
    }


def total(found: Iterable[Penalty]) -> list[tf.Tensor]:
    """The sum of the penalties of each home, there: one number to be sent, not one a weight."""
    homes: dict[tuple[str, tf.DType], list[tf.Tensor]] = {}
    for penalty in found:
        homes.setdefault((penalty.home, penalty.value.dtype), []).append(penalty.value)
    sums = []
    for (home, _), values in homes.items():
        with tf.device(home or None):
            sums.append(tf.add_n(values))
    return sums


class Halved:
    """Penalties that Keras adds to a loss under a tape, with the way to the weights kept apart.

    One tape over everything would take the gradients on the merge device, with a copy of
    each weight there.

    Args:
        homes: Where weights live.
        tape: The tape of the loss, `None` if no gradient will be taken.
    """

    def __init__(self, homes: Homes, tape: tf.GradientTape | None) -> None:
        self._homes, self._tape = homes, tape
        self._found: list[Penalty] = []

    @property
    def values(self) -> list[tf.Tensor]:
        """The penalties, which the tape watches."""
        return [penalty.value for penalty in self._found]

    @contextlib.contextmanager
    def watching(self, variables: Sequence[keras.Variable]) -> Iterator[None]:
        """Inside, the regularisers of the weights run where those live."""
        with regularized(variables, self._penalty):
            yield

    def gradients(self, upstream: Sequence[tf.Tensor | None]) -> dict[int, list[Any]]:
        """The gradients of the weights, by their `id`, on their homes.

        Args:
            upstream: The gradients of the `values`, `None` where the loss has no use for one.
        """
        found: dict[int, list[Any]] = {}
        for penalty, up in zip(self._found, upstream, strict=True):
            if up is not None:
                found.setdefault(id(penalty.variable), []).append(penalty.gradient(up))
        return found

    def _penalty(self, variable: keras.Variable, regularizer: Callable[[Any], Any]) -> tf.Tensor:
        tape = self._tape
        with contextlib.nullcontext() if tape is None else tape.stop_recording():
            penalty = Penalty.of(variable, regularizer, self._homes.of(variable))
        if tape is not None:
            tape.watch(penalty.value)
            self._found.append(penalty)
        return penalty.value


@contextlib.contextmanager
def at_home(variables: Sequence[keras.Variable], homes: Homes) -> Iterator[None]:
    """Inside, regularisers run where their weights live, under tapes that are not known.

    Args:
        variables: Weights.
        homes: Where they live.
    """

    def penalty(variable: keras.Variable, regularizer: Callable[[Any], Any]) -> tf.Tensor:
        home = homes.of(variable)

        @tf.custom_gradient
        def at(value: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(up: tf.Tensor, variables: Any = None) -> Any:
                # Computed here, so that a tape around it can go on to further orders.
                with tf.device(home or None), tf.GradientTape() as tape:
                    tape.watch(value)
                    again = tf.convert_to_tensor(regularizer(value))
                with tf.device(home or None):
                    of_value, of_others = tape.gradient(again, [value, variables or []], up)
                return of_value if variables is None else (of_value, of_others)

            with tf.device(home or None):
                return tf.convert_to_tensor(regularizer(value)), gradient

        return at(tf.convert_to_tensor(variable.value))

    apart = homes.apart and not tf.executing_eagerly()
    with regularized(variables if apart else [], penalty):
        yield


class _Instead(keras.regularizers.Regularizer):
    """Stands in for a weight's regulariser; Keras 3.8 takes nothing but a `Regularizer`."""

    def __init__(
        self,
        variable: keras.Variable,
        regularizer: Callable[[Any], Any],
        penalty: Callable[[keras.Variable, Callable[[Any], Any]], tf.Tensor],
    ) -> None:
        self._variable, self._regularizer, self._penalty = variable, regularizer, penalty

    def __call__(self, x: Any) -> Any:
        """The penalty, where it is asked of the weight itself."""
        if x is self._variable:
            return self._penalty(self._variable, self._regularizer)
        return self._regularizer(x)


@contextlib.contextmanager
def regularized(
    variables: Sequence[keras.Variable],
    penalty: Callable[[keras.Variable, Callable[[Any], Any]], tf.Tensor],
) -> Iterator[None]:
    """Inside, a call of a weight's regulariser with that weight is this function's.

    Args:
        variables: Weights.
        penalty: Function from a weight and its regulariser to a scalar.
    """
    given = {id(variable): (variable, variable.regularizer) for variable in variables}
    held = [(v, regularizer) for v, regularizer in given.values() if regularizer is not None]
    try:
        for variable, regularizer in held:
            variable.regularizer = _Instead(variable, regularizer, penalty)
        yield
    finally:
        for variable, regularizer in held:
            variable.regularizer = regularizer
