"""What stands for the workers where there is only this one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tensorflow as tf

from parallel_keras.shard import Shards, shard
from parallel_keras.workers.message import Columns, Result


class Alone:
    """Stands for the workers where there is only this one: changes and costs nothing.

    Args:
        towers: Int, the number of towers.
    """

    index, size, first, chief, feeds_own_rows, timeout = 0, 1, 0, True, False, 300.0

    def __init__(self, towers: int) -> None:
        self.towers = towers

    def cut(self, batch: Any, whole: Collection[str], *, fed_here: bool) -> Shards:
        """Shards a batch; see `AnyWorkers.cut`."""
        del fed_here
        return shard(batch, self.towers, whole)

    def join(self, results: list[Result], kind: str, shards: Shards) -> list[Result]:
        """The results of all towers; see `AnyWorkers.join`."""
        del kind, shards
        return results

    def add_up(self, columns: Columns) -> Columns:
        """Gradients of all towers; see `AnyWorkers.add_up`."""
        return columns

    def shared(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Weights whose gradients are summed; see `AnyWorkers.shared`."""
        return values

    def whole_batch(self, data: Any) -> Any:
        """The batch of all workers; see `AnyWorkers.whole_batch`."""
        return data

    def own_rows(self, outputs: Any, data: Any) -> Any:
        """The rows of this worker; see `AnyWorkers.own_rows`."""
        del data
        return outputs
