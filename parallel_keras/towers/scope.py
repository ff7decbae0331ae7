"""Makes a model a pure function while it is called: reads and writes are caught."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras.towers.graph import is_handle
from parallel_keras.towers.losses import adds_up_by_rows
from parallel_keras.towers.seeds import is_seed, tower_seed


class TowerScope(keras.StatelessScope):
    """Reads variables from tensors of the tower and notes what would be assigned.

    Args:
        variables: Sequence of the variables that have a value of their own here.
        values: Sequence of those values, tensors on the tower's device. Of a variable
            that stays where it is, its handle: it is read only if somebody asks.
        tower: Integer tensor `()`, the number of the tower; `None` if there is
            only one. Each tower draws random numbers from its own stream.

    Attributes:
        updates: What was assigned, by id of the variable: the variable and its
            values in order.
        terms: What layers gave to `add_loss`, by where it came from: `"add_loss"`
            for calls of their own, `"activity"` for activity regularisers.
        activities: What activity regularisers were given that must see the whole batch, by the
            number of the layer.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        values: Sequence[tf.Tensor],
        tower: tf.Tensor | None,
    ) -> None:
        self._tower = tower
        self._reading_outside = False
        self.updates: dict[int, tuple[keras.Variable, list[tf.Tensor]]] = {}
        self.terms: dict[str, list[tf.Tensor]] = {"activity": [], "add_loss": []}
        self.activities: dict[str, list[tf.Tensor]] = {}
        self._source = "add_loss"
        self._handles: dict[int, tuple[tf.Tensor, str]] = {}
        own: list[tuple[keras.Variable, tf.Tensor]] = []
        for variable, value in zip(variables, values, strict=True):
            if is_handle(value):
                # Inside of a layer, mixed precision gives the variable another dtype.
                self._handles[id(variable)] = value, variable.dtype
            elif tower is not None and is_seed(variable):
                own.append((variable, tower_seed(value, tower)))
            else:
                own.append((variable, value))
        self._given = {id(variable): value for variable, value in own}
        self._graph = tf.compat.v1.get_default_graph()
        super().__init__(own, collect_losses=True)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Notes an assignment; what is read afterwards is the new value.

        As with a real variable, no gradient flows through the assignment, and
        what flows to the new value counts for the variable.
        """
        variable, value = update
        if value.dtype.is_floating:
            self._read_handle(variable)
            value = tf.stop_gradient(value)
            given = self._given.get(id(variable))
            if given is not None and variable.trainable:
                value += given - tf.stop_gradient(given)
        self.updates.setdefault(id(variable), (variable, []))[1].append(value)
        super().add_update((variable, value))

    def add_loss(self, loss: tf.Tensor) -> None:
        """Notes a term of the loss and where it came from.

        Args:
            loss: Tensor, the term.
        """
        source, self._source = self._source, "add_loss"
        if source in self.terms:
            self.terms[source].append(loss)
            super().add_loss(loss)

    @contextlib.contextmanager
    def telling_activity(self, layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
        """Inside, terms of activity regularisers are told from those of `add_loss`.

        Keras calls the regulariser and adds its result as a term right after. The two
        have rules of their own, see `losses.ACTIVITY_RULE`. A regulariser that is not known to
        add up over rows is not called here, but what it would be given is kept.

        Args:
            layers: All layers of the model.
        """

        def telling(number: int, regularizer: Any) -> Any:
            def regularize(output: Any) -> Any:
                if self._tower is None or adds_up_by_rows(regularizer):
                    self._source = "activity"
                    return regularizer(output)
                self.activities.setdefault(str(number), []).append(output)
                self._source = "later"
                return tf.zeros((), output.dtype)

            return regularize

        regularized = [
            (number, layer, layer.activity_regularizer)
            for number, layer in enumerate(layers)
            if layer.activity_regularizer is not None
        ]
        try:
            for number, layer, regularizer in regularized:
                layer.activity_regularizer = telling(number, regularizer)
            yield
        finally:
            for _, layer, regularizer in regularized:
                layer.activity_regularizer = regularizer

    def latest(self, variable: keras.Variable) -> tf.Tensor:
        """The value of one of the given variables, as it is now."""
        return self.state_mapping[id(variable)]

    def handle(self, variable: keras.Variable) -> tf.Tensor | None:
        """The handle that stands for a variable here, `None` if it has a value."""
        return self._handles.get(id(variable), (None,))[0]

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value of a variable in this tower, `None` for the variable itself.

        A seed generator that is not the model's, such as Keras' global one, gets
        a stream for each tower at its first use.
        """
        self._read_handle(variable)
        value = super().get_current_value(variable)
        if value is not None or self._tower is None or self._reading_outside:
            return value
        if is_seed(variable):
            self._reading_outside = True
            value = tower_seed(tf.convert_to_tensor(variable.value), self._tower)
            self._reading_outside = False
            self.state_mapping[id(variable)] = value
        return value

    def _read_handle(self, variable: keras.Variable) -> None:
        """Reads a variable that stays where it is as a whole, once."""
        if id(variable) not in self._handles or id(variable) in self._given:
            return
        handle, dtype = self._handles[id(variable)]
        # The first to ask may be a branch of a condition, and the next one is outside of it.
        with self._graph.as_default():
            value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
        value.set_shape(variable.shape)
        self._given[id(variable)] = self.state_mapping[id(variable)] = value
