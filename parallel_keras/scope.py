"""Makes a model a pure function while it is called: reads, writes and reductions are caught."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from parallel_keras.state import is_seed, tower_seed

# Collectives of one process share one name space with those of tf.distribute, which counts up
# from 1: start far away from it.
_GROUPS: dict[tuple[str, ...], int] = {}
_FIRST_GROUP = 7_700_000
_GROUP_OF_WORKERS = 7_699_999
_PASSES = itertools.count(1)
_REDUCTIONS_A_PASS = 2048
_TIMEOUT_SECONDS = 300.0


class Peers(NamedTuple):
    """What a tower needs to add something up with the other towers of its pass.

    Attributes:
        size: int32 tensor `()`, how many towers take part.
        group: int32 tensor `()`, the key of this set of devices.
        instance: int32 tensor `()`, the key of the pass.
        token: Resource handle of a variable on the tower's device. It chains the
            reductions of one tower; without it TensorFlow would chain those of
            all towers, which then wait for each other for ever.
        live: float32 tensor `()`, 0 if the tower only stands in.
        timeout: Seconds after which a tower gives up waiting for the others.
    """

    size: tf.Tensor
    group: tf.Tensor
    instance: tf.Tensor
    token: tf.Tensor
    live: tf.Tensor
    timeout: float = _TIMEOUT_SECONDS


def peer_keys(devices: tuple[str, ...], others: int = 0) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Size, group and instance of a new pass over these devices, and those of other workers."""
    # What is counted here need not be counted alike there.
    own = _FIRST_GROUP + len(_GROUPS)
    group = _GROUP_OF_WORKERS if others else _GROUPS.setdefault(devices, own)
    instance = (next(_PASSES) * 2 * _REDUCTIONS_A_PASS) % (2**31 - 2 * _REDUCTIONS_A_PASS)
    return tf.constant(len(devices) + others), tf.constant(group), tf.constant(instance)


class TowerScope(keras.StatelessScope):
    """Reads variables from tensors of the tower and notes what would be assigned.

    Args:
        variables: Sequence of the variables that have a value of their own here.
        values: Sequence of those values, tensors on the tower's device.
        tower: Integer tensor `()`, the number of the tower; `None` if there is
            only one. Each tower draws random numbers from its own stream.

    Attributes:
        updates: What was assigned, by id of the variable: the variable and its
            values in order.
        terms: What layers gave to `add_loss`, by where it came from: `"add_loss"`
            for calls of their own, `"activity"` for activity regularisers.
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
        self._source = "add_loss"
        own = [
            tower_seed(value, tower) if tower is not None and is_seed(variable) else value
            for variable, value in zip(variables, values, strict=True)
        ]
        self._given = {id(variable): value for variable, value in zip(variables, own, strict=True)}
        super().__init__(zip(variables, own, strict=True), collect_losses=True)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Notes an assignment; what is read afterwards is the new value.

        As with a real variable, no gradient flows through the assignment, and
        what flows to the new value counts for the variable.
        """
        variable, value = update
        if value.dtype.is_floating:
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
        self.terms[self._source].append(loss)
        self._source = "add_loss"
        super().add_loss(loss)

    @contextlib.contextmanager
    def telling_activity(self, layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
        """Inside, terms of activity regularisers are told from those of `add_loss`.

        Keras calls the regulariser and adds its result as a term right after. The two
        have rules of their own, see `losses.ACTIVITY_RULE`.

        Args:
            layers: All layers of the model.
        """

        def telling(regularizer: Any) -> Any:
            def regularize(output: Any) -> Any:
                self._source = "activity"
                return regularizer(output)

            return regularize

        given = {layer: layer.activity_regularizer for layer in layers}
        regularized = {layer: given[layer] for layer in layers if given[layer] is not None}
        try:
            for layer, regularizer in regularized.items():
                layer.activity_regularizer = telling(regularizer)
            yield
        finally:
            for layer, regularizer in regularized.items():
                layer.activity_regularizer = regularizer

    def latest(self, variable: keras.Variable) -> tf.Tensor:
        """The value of one of the given variables, as it is now."""
        return self.state_mapping[id(variable)]

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value of a variable in this tower, `None` for the variable itself.

        A seed generator that is not the model's, such as Keras' global one, gets
        a stream for each tower at its first use.
        """
        value = super().get_current_value(variable)
        if value is not None or self._tower is None or self._reading_outside:
            return value
        if is_seed(variable):
            self._reading_outside = True
            value = tower_seed(tf.convert_to_tensor(variable.value), self._tower)
            self._reading_outside = False
            self.state_mapping[id(variable)] = value
        return value


class TowerContext(tf.distribute.ReplicaContext):
    """Lets layers that ask for the other replicas find the other towers.

    Keras' `BatchNormalization(synchronized=True)` adds its sums and counts up by
    `tf.distribute.get_replica_context().all_reduce`. Here that is a collective
    over the towers, also in the gradient.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__(tf.distribute.get_strategy(), 0)
        self._peers = peers
        self._count = 0

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        """Adds up a tensor over the towers.

        Args:
            reduce_op: `tf.distribute.ReduceOp.SUM`.
            value: Tensor, of one shape on all towers.
            options: Not used: the towers are devices of one process.

        Returns:
            The sum, the same on all towers.

        Raises:
            ValueError: For another `reduce_op`.
        """
        del options
        if tf.distribute.ReduceOp(_op_name(reduce_op)) != tf.distribute.ReduceOp.SUM:
            raise ValueError(
                "Expected towers to be reduced by tf.distribute.ReduceOp.SUM: a mean over towers "
                f"would ignore how many rows each has. Received: reduce_op={reduce_op}. "
                "Reduce the sum and the count, and divide."
            )
        key = self._peers.instance + 2 * self._count
        self._count += 1
        live = tf.cast(self._peers.live, value.dtype)

        @tf.custom_gradient
        def reduced(own: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return self._collect(own * live, key), lambda up: self._collect(up, key + 1) * live

        return reduced(value)

    def _collect(self, value: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        merged = tf.raw_ops.CollectiveReduceV2(
            input=value,
            group_size=self._peers.size,
            group_key=self._peers.group,
            instance_key=key,
            ordering_token=[self._peers.token],
            merge_op="Add",
            final_op="Id",
            timeout_seconds=self._peers.timeout,
        )
        return tf.ensure_shape(merged, value.shape)


@contextlib.contextmanager
def talking_to(peers: Peers | tf.Tensor | None) -> Iterator[None]:
    """Lets layers reduce over the other towers, if there are any."""
    with TowerContext(peers) if isinstance(peers, Peers) else contextlib.nullcontext():
        yield


def _op_name(reduce_op: Any) -> str:
    return str(getattr(reduce_op, "value", reduce_op)).upper()


def depends_on(tensor: tf.Tensor, sources: Sequence[tf.Tensor]) -> bool:
    """Whether a tensor of a graph is computed from any of the sources, or at random.

    Args:
        tensor: Tensor of a `tf.function` that is being traced.
        sources: Sequence of tensors of the same graph.

    Returns:
        `False` only if it is certainly the same whatever the sources are.
    """
    ends = {source.op.name for source in sources}
    waiting, seen = [tensor.op], {tensor.op.name}
    while waiting:
        op = waiting.pop()
        if op.name in ends or (op.op_def.is_stateful and op.type not in _READS):
            return True
        for parent in (value.op for value in op.inputs):
            if parent.name not in seen:
                seen.add(parent.name)
                waiting.append(parent)
    return False


_READS = frozenset({"Placeholder", "ReadVariableOp", "VarHandleOp", "ResourceGather"})
