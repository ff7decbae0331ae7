"""Makes a model a pure function while it is called: reads and writes are caught."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras.graphs.graph import is_handle, varies
from parallel_keras.towers.losses import adds_up_by_rows
from parallel_keras.towers.needs import TraceAgain
from parallel_keras.towers.seeds import is_seed, started, tower_seed


@dataclasses.dataclass
class Lent:
    """What a tower has besides values of variables.

    Attributes:
        extras: What stands for variables that are not the template's, `None` for themselves.
        stand_ins: The ids of the variables that a `tf.Variable` stands in for, to be
            assigned like them.
        themselves: Whether those are the variables themselves: there is one tower only.
        inner_graphs: The graphs of loops, branches and functions in which weights were read.
    """

    extras: Sequence[tf.Variable | None] = ()
    stand_ins: Collection[int] = ()
    themselves: bool = False
    inner_graphs: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Assigned:
    """What was assigned to a variable.

    Attributes:
        variable: The variable.
        values: Its values in order.
        stand_in: What was assigned instead, if anything was.
        varies: Whether a value assigned to that depends on the shard.
        inside: Whether one was assigned inside of a loop, a branch or a function, where
            nobody knows how often that happens.
    """

    variable: keras.Variable
    values: list[tf.Tensor] = dataclasses.field(default_factory=list)
    stand_in: tf.Variable | None = None
    varies: bool = False
    inside: bool = False


class TowerScope(keras.StatelessScope):
    """Reads variables from tensors of the tower and notes what would be assigned.

    Args:
        variables: Sequence of the variables that have a value of their own here.
        values: Sequence of those values, tensors on the tower's device. Of a variable
            that stays where it is, its handle: it is read only if somebody asks. Or a
            `tf.Variable`, which is read as that.
        tower: Integer tensor `()`, the number of the tower; `None` if there is
            only one. Each tower draws random numbers from its own stream.
        lent: What the tower has besides. Defaults to nothing.

    Attributes:
        updates: What was assigned, by id of the variable.
        terms: What layers gave to `add_loss`, by where it came from: `"add_loss"`
            for calls of their own, `"activity"` for activity regularisers.
        activities: What activity regularisers were given that must see the whole batch, by the
            number of the layer.
        left: What the call left on layers, see `left_behind`.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        values: Sequence[tf.Tensor],
        tower: tf.Tensor | None,
        lent: Lent | None = None,
    ) -> None:
        self._tower = tower
        self._lent = lent or Lent()
        self._reading_outside = False
        self.updates: dict[int, Assigned] = {}
        self.terms: dict[str, list[tf.Tensor]] = {"activity": [], "add_loss": []}
        self.activities: dict[str, list[tf.Tensor]] = {}
        self.left: dict[str, dict[str, Any]] = {}
        self._source = "add_loss"
        self._handles: dict[int, tuple[tf.Tensor, str]] = {}
        self._real: dict[int, tf.Variable] = {}
        self._stand_ins: set[int] = set()
        mapping: list[tuple[keras.Variable, tf.Tensor]] = []
        for variable, value in zip(variables, values, strict=True):
            if isinstance(value, tf.Variable):
                self._real[id(variable)] = value
                if id(variable) in self._lent.stand_ins or self._lent.themselves:
                    self._stand_ins.add(id(variable))
            elif is_handle(value):
                # Inside of a layer, mixed precision gives the variable another dtype.
                self._handles[id(variable)] = value, variable.dtype
            else:
                mapping.append((variable, started(value, variable, tower)))
        self._given: dict[int, Any] = {id(variable): value for variable, value in mapping}
        self._eager = tf.executing_eagerly()
        self._graph = tf.compat.v1.get_default_graph()
        super().__init__(mapping, collect_losses=True)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Notes an assignment; what is read afterwards is the new value.

        As with a real variable, no gradient flows through the assignment, and
        what flows to the new value counts for the variable.
        """
        variable, value = update
        if id(variable) in self._stand_ins:
            self._assign(variable, value)
            return
        if self._is_inside():
            raise TraceAgain(stand_ins=[variable])
        if value.dtype.is_floating:
            self._read_handle(variable)
            value = tf.stop_gradient(value)
            given = self._given.get(id(variable), self._real.get(id(variable)))
            if given is not None and variable.trainable:
                given = tf.convert_to_tensor(given)
                value += given - tf.stop_gradient(given)
        self._noted(variable).values.append(value)
        super().add_update((variable, value))

    def _assign(self, variable: keras.Variable, value: tf.Tensor) -> None:
        """Assigns a value to what stands in for a variable, as Keras does to the variable."""
        stand_in = self._real[id(variable)]
        stand_in.assign(tf.cast(value, stand_in.dtype))
        if self._lent.themselves:
            return
        handles = [
            *(real.handle for real in self._real.values()),
            *(handle for handle, _ in self._handles.values()),
        ]
        noted = self._noted(variable)
        noted.stand_in = stand_in
        noted.varies |= varies(value, [*self._given.values(), *handles])
        noted.inside |= self._is_inside()
        noted.values.append(value)

    def _noted(self, variable: keras.Variable) -> Assigned:
        return self.updates.setdefault(id(variable), Assigned(variable))

    def _is_inside(self) -> bool:
        """Whether a loop, a branch or a function inside of the tower is being traced."""
        return tf.compat.v1.get_default_graph() is not self._graph

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

    @property
    def several(self) -> bool:
        """Whether there are other towers."""
        return self._tower is not None

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
        if self._is_inside():
            self._lent.inner_graphs.append(tf.compat.v1.get_default_graph())
        self._read_handle(variable)
        value = super().get_current_value(variable)
        if value is None:
            value = self._real.get(id(variable))
        if value is not None or self._tower is None or self._reading_outside:
            return value
        if is_seed(variable):
            self._reading_outside = True
            # The first to ask may be a branch of a condition, and the next one is outside of it.
            with contextlib.nullcontext() if self._eager else self._graph.as_default():
                value = tower_seed(tf.convert_to_tensor(variable.value), self._tower)
            self._reading_outside = False
            self.state_mapping[id(variable)] = value
        return value

    def _read_handle(self, variable: keras.Variable) -> None:
        """Reads a variable that stays where it is as a whole, once."""
        if id(variable) not in self._handles or id(variable) in self._given:
            return
        handle, dtype = self._handles[id(variable)]
        # As above: others will ask outside.
        with self._graph.as_default():
            value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
        value.set_shape(variable.shape)
        self._given[id(variable)] = self.state_mapping[id(variable)] = value
