"""What towers of one pass need to talk to each other, or to run without waiting for each other."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from parallel_keras import _compat

_compat.mark_lookups()
# Collectives of one process share one name space with those of tf.distribute, which counts up
# from 1: start far away from it.
_GROUPS: dict[tuple[str, ...], int] = {}
_FIRST_GROUP = 7_700_000
_GROUP_OF_WORKERS = 7_699_999
_PASSES = itertools.count(1)
_REDUCTIONS_A_PASS = 2048
_TOKENS: dict[str, tf.Tensor] = {}


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
    timeout: float


def _keys(devices: tuple[str, ...], others: int = 0) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Size, group and instance of a new pass over these devices, and those of other workers."""
    # What is counted here need not be counted alike there.
    new = _FIRST_GROUP + len(_GROUPS)
    group = _GROUP_OF_WORKERS if others else _GROUPS.setdefault(devices, new)
    instance = (next(_PASSES) * 2 * _REDUCTIONS_A_PASS) % (2**31 - 2 * _REDUCTIONS_A_PASS)
    return tf.constant(len(devices) + others), tf.constant(group), tf.constant(instance)


def make_tokens(devices: Sequence[str]) -> None:
    """Makes a resource on each device, whose handle `token` gives.

    Not by `tf.Variable`: TensorFlow notices one that is made while it traces a step, wherever it
    is made, and traces the step again.

    Args:
        devices: Sequence of device names.
    """
    for device in devices:
        if device not in _TOKENS:
            with tf.init_scope(), tf.device(device):
                handle = tf.raw_ops.VarHandleOp(
                    dtype=tf.float32, shape=[], shared_name="parallel_keras_tower_token"
                )
                tf.raw_ops.AssignVariableOp(resource=handle, value=tf.constant(0.0))
                _TOKENS[device] = handle


def token(device: str) -> tf.Tensor:
    """The handle of a variable on a device, as a tensor that lives there too.

    TensorFlow runs calls with side effects (printing, Python functions) one after the
    other, unless they take a resource. So every tower takes one.

    Args:
        device: Name of a device that `make_tokens` was called with.

    Returns:
        A resource tensor of shape `()`.
    """
    with tf.device(device):
        return tf.identity(_TOKENS[device])


def meet(devices: tuple[str, ...], rows: Sequence[Any], others: int, timeout: float) -> list[Peers]:
    """The `Peers` of each tower of a new pass.

    Args:
        devices: The devices of the towers here.
        rows: How many rows each of them has.
        others: How many towers of other workers take part.
        timeout: Seconds after which a tower gives up waiting.

    Returns:
        A list, one entry for each device.
    """
    keys = _keys(devices, others)
    live = [tf.cast(count > 0, tf.float32) for count in map(tf.convert_to_tensor, rows)]
    return [
        Peers(*keys, token(device), alive, timeout)
        for device, alive in zip(devices, live, strict=True)
    ]


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
        def reduced(given: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return self._collect(given * live, key), lambda up: self._collect(up, key + 1) * live

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


class _OneReplica(tf.distribute.ReplicaContext):
    def __init__(self) -> None:
        super().__init__(tf.distribute.get_strategy(), 0)

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        del reduce_op, options
        return value


@contextlib.contextmanager
def one_replica() -> Iterator[None]:
    """Inside, optimizers find no other replica to add gradients up with, at no cost.

    Without a strategy there is none either, but there TensorFlow wraps the gradients in a
    function that it registers, and so keeps until the process ends, with the graph of the
    step: a process that compiles again and again would keep the graph of each time.
    """
    with contextlib.nullcontext() if tf.distribute.has_strategy() else _OneReplica():
        yield


@contextlib.contextmanager
def talking_to(peers: Peers | tf.Tensor | None) -> Iterator[None]:
    """Lets layers reduce over the other towers, if there are any."""
    with TowerContext(peers) if isinstance(peers, Peers) else contextlib.nullcontext():
        yield


def _op_name(reduce_op: Any) -> str:
    return str(getattr(reduce_op, "value", reduce_op)).upper()
