"""Several machines: which towers are here, and sums over all workers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import replaced, tensors
from parallel_keras.shard import Shards, shard
from parallel_keras.workers import cluster, exchange, faults
from parallel_keras.workers.exchange import Slots
from parallel_keras.workers.feeding import check_dense, fill, mark
from parallel_keras.workers.joining import MarkedShards, exchange_messages, join
from parallel_keras.workers.message import Columns, Message, Result

# Seconds after which a worker that waits for another one gives up.
TIMEOUT = 60.0
# Collectives share one name space with those of tf.distribute, which counts up from 1, and
# of `peers`, which starts at 7,700,000. Kinds have a group each, so that workers that do
# different things wait for each other until the timeout instead of adding up what differs.
_FIRST_GROUP = 7_600_000
KINDS = ("start", "sizes", "rows", "batch", "train", "test", "call", "gradients", "towers")


class Workers:
    """The workers of a `tf.distribute.MultiWorkerMirroredStrategy`, seen from one of them.

    All towers of all workers stand in one row, worker by worker, and share out each
    batch as the towers of one worker do. The strategy only sets up the connection.

    Args:
        strategy: The strategy, whose cluster has at least two workers.
        feeds_own_rows: Bool, whether each worker feeds its own rows to `fit`, instead of all
            feeding the same whole batches.

    Attributes:
        cluster: The `Cluster`.
        index: Int, the number of this worker. Number 0 is the chief.
        size: Int, the number of workers.
        first: Int, the number of this worker's first tower among those of all.
        here: Int, the number of towers of this worker.
        towers: Int, the number of towers of all workers.
        traffic: Dict from the kind of message to the bytes that this worker sends for
            one of them, those of which the size is known while tracing.
    """

    def __init__(self, strategy: Any, *, feeds_own_rows: bool) -> None:
        resolver = strategy.cluster_resolver
        task = {"type": resolver.task_type, "index": resolver.task_id}
        jobs = resolver.cluster_spec().as_dict()
        self.cluster = cluster.read(json.dumps({"cluster": jobs, "task": task}))
        self.feeds_own_rows = feeds_own_rows
        self.index, self.size = self.cluster.rank, len(self.cluster.tasks)
        self.chief = self.index == 0
        self.timeout = float(_compat.strategy_timeout(strategy) or TIMEOUT)
        self.traffic: dict[str, int] = {}
        self.task = f"/job:{self.cluster.own.job}/replica:0/task:{self.cluster.own.index}"
        self.device = f"{self.task}/device:CPU:0"
        self.first, self.towers, self.here = self.index, self.size, 1
        with tf.init_scope(), tf.device(self.device):
            self._token = tf.Variable(0.0, trainable=False, name="workers_token")

    def seat(self, towers: int) -> None:
        """Tells the other workers how many towers are here, and learns how many they have.

        Args:
            towers: Int.
        """
        counts = [int(count) for (count,) in self.gather([tf.constant(towers)], "start")]
        self.first, self.towers, self.here = sum(counts[: self.index]), sum(counts), towers

    def cut(self, batch: Any, whole: Collection[str], *, fed_here: bool) -> Shards:
        """Shards a batch: the parts of this worker, the rows of all.

        Args:
            batch: Nest of tensors.
            whole: Names of leaves that every tower gets whole.
            fed_here: Whether it holds the rows of this worker only, where each feeds its own.

        Returns:
            The `Shards`. `parts` has one entry for each tower of this worker, `rows` one
            for each tower of all workers.
        """
        if not (fed_here and self.feeds_own_rows):
            here = range(self.first, self.first + self.here)
            shards = shard(batch, self.towers, whole, here)
            return MarkedShards.of(shards, mark(batch))
        filled, some = fill(batch)
        shards = shard(filled, self.here, whole, range(self.here))
        counted = [[tf.convert_to_tensor(rows) * some] for rows in shards.rows]
        _, everyone, _ = self.exchange("rows", fixed=counted)
        rows = [count for (count,) in everyone]
        total = tf.add_n(rows)
        check = tf.debugging.assert_positive(
            total, message="No worker has rows left: each worker has fewer batches than steps."
        )
        with tf.control_dependencies([] if check is None else [check]):
            return Shards(shards.parts, rows, tf.identity(total))

    def join(self, results: list[Result], kind: str, shards: Shards) -> list[Result]:
        """From the results of the towers here to those of all; see `joining.join`."""
        return join(self, results, kind, shards)

    def add_up(self, columns: Columns) -> Columns:
        """Adds gradients up over all towers of all workers.

        Args:
            columns: For each weight a list of the gradients of the towers here, which
                may be `None` or `tf.IndexedSlices`.

        Returns:
            For each weight a list of what remains to be added.
        """
        if not columns:
            return columns
        towers = [Message(list(row), (), (), (), ()) for row in zip(*columns, strict=True)]
        joined = exchange_messages(self, towers, "gradients", Shards([], [], 0))
        return [list(column) for column in zip(*[told.gradients for told in joined], strict=True)]

    def shared(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Values that every worker has, and of which each computes a part of the gradient.

        Args:
            values: List of float tensors.

        Returns:
            The same, with gradients that are summed over the workers, to any order. Sparse ones
            must have been added up before: their sum is no sum of tensors.
        """
        if not values:
            return values

        def gradient(*parts: Any) -> list[Any]:
            dense = [i for i, part in enumerate(parts) if not isinstance(part, tf.IndexedSlices)]
            sums = summed(*[parts[index] for index in dense]) if dense else []
            several = sums if isinstance(sums, (list, tuple)) else [sums]
            found = dict(zip(dense, several, strict=True))
            return [found.get(index, part) for index, part in enumerate(parts)]

        @tf.custom_gradient
        def spread(*given: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            return [tf.identity(value) for value in given], gradient

        @tf.custom_gradient
        def summed(*parts: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
            sums, _, _ = self.exchange("gradients", list(map(tf.convert_to_tensor, parts)))
            return sums, spread

        result = spread(*values)
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def whole_batch(self, data: Any) -> Any:
        """Puts the rows of all workers one after the other, where each feeds its own.

        Args:
            data: Nest of dense tensors with rows.

        Returns:
            The batch, the same on all workers.

        Raises:
            ValueError: If there are ragged, sparse or string tensors.
        """
        if not self.feeds_own_rows:
            return data
        check_dense(data)
        leaves = [tf.convert_to_tensor(leaf) for leaf in tensors(data)]
        workers = self.gather(leaves, "batch")
        batch = [tf.concat(list(column), axis=0) for column in zip(*workers, strict=True)]
        for joined, leaf in zip(batch, leaves, strict=True):
            joined.set_shape([None, *leaf.shape[1:]])
        return replaced(data, batch)

    def own_rows(self, outputs: Any, data: Any) -> Any:
        """Takes this worker's rows out of those of all; the inverse of `whole_batch`."""
        if not self.feeds_own_rows:
            return outputs
        count = tf.shape(tensors(data)[0])[0]
        counts = [rows for (rows,) in self.gather([count], "rows")]
        start = tf.add_n([tf.zeros_like(count), *counts[: self.index]])
        return tf.nest.map_structure(lambda leaf: leaf[start : start + count], outputs)

    def from_chief(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """The values that the first worker has, exactly.

        Args:
            values: List of tensors, of the same shapes on all workers.

        Returns:
            A list of tensors like them.
        """
        if not values:
            return []
        with tf.device(self.device):
            said = [exchange.encode(tf.convert_to_tensor(value)) for value in values]
            sums, _, _ = self.exchange(
                "start", [part if self.chief else tf.zeros_like(part) for part in said]
            )
            return [
                exchange.decode(part, value.dtype, value.shape)
                for part, value in zip(sums, values, strict=True)
            ]

    @contextlib.contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Tells which worker an error of the connection comes from."""
        try:
            yield
        except faults.ERRORS as error:
            named = faults.named(error, self.cluster, self.timeout)
            if named is None:
                raise
            raise named from error

    def gather(self, values: list[tf.Tensor], kind: str) -> list[list[tf.Tensor]]:
        """The values of each worker, of any shapes.

        Args:
            values: List of tensors, of as many on each worker.
            kind: One of `KINDS`.

        Returns:
            For each worker the list of its values.
        """
        place = (self.index, self.size)
        return self.exchange(kind, varied=[values], place=place)[2]

    def exchange(
        self,
        kind: str,
        sums: Sequence[tf.Tensor] = (),
        fixed: Slots | None = None,
        varied: Slots | None = None,
        place: tuple[int, int] | None = None,
    ) -> tuple[list[tf.Tensor], Slots, Slots]:
        """Adds up and gathers over all workers, in one message.

        Args:
            kind: One of `KINDS`.
            sums: Float tensors to be added up, of one shape on all workers.
            fixed: For each slot of this worker tensors to be gathered, of the same
                shapes in all slots. Defaults to none.
            varied: Likewise, of any shapes of the same rank. Their sizes are exchanged
                first. Defaults to none.
            place: The number of the first slot of this worker, and the number of
                all slots. Defaults to a slot for each tower.

        Returns:
            The sums, and for each slot of all workers the tensors.
        """
        first, total = place or (self.first, self.towers)

        def reduce(message: tf.Tensor, topic: str = kind) -> tf.Tensor:
            return self._reduce(message, topic)

        with tf.device(self.device):
            return exchange.exchange(reduce, sums, fixed or [], varied or [], first, total)

    def _reduce(self, message: tf.Tensor, kind: str) -> tf.Tensor:
        if message.shape[0] == 0:
            return message
        wide = message.dtype == tf.float64
        if message.shape[0] is not None:
            sent = 2 * (self.size - 1) * message.shape[0] * message.dtype.size // self.size
            self.traffic["wide " * wide + kind] = sent
        return tf.raw_ops.CollectiveReduceV2(
            input=message,
            group_size=self.size,
            group_key=_FIRST_GROUP + 2 * KINDS.index(kind) + wide,
            # TensorFlow wants one size of message for each key.
            instance_key=tf.size(message),
            ordering_token=[self._token.handle],
            merge_op="Add",
            final_op="Id",
            communication_hint="ring",
            timeout_seconds=self.timeout,
        )


def connect(strategy: Any, *, feeds_own_rows: bool) -> Workers | None:
    """The workers of a strategy.

    Args:
        strategy: The strategy, or `None`.
        feeds_own_rows: Bool, whether each worker feeds its own rows.

    Returns:
        The `Workers`, or `None` if this is the only one.
    """
    jobs = {} if strategy is None else strategy.cluster_resolver.cluster_spec().as_dict()
    return (
        Workers(strategy, feeds_own_rows=feeds_own_rows)
        if sum(map(len, jobs.values())) > 1
        else None
    )
