"""What the towers of one worker tell those of the others. Pure: knows nothing of models."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import tensorflow as tf

if TYPE_CHECKING:
    from parallel_keras.shard import Shards

# For each weight, the gradient of each tower.
Columns = list[list[Any]]


class Message(NamedTuple):
    """What one tower has for the towers of other workers.

    Attributes:
        gradients: Gradients of the weights, which are added up: of all towers the first
            has the sum afterwards.
        by_rows: Nest of tensors that have a row for each of the tower's own.
        numbers: Nest of tensors of the same shapes on all towers, parts of a loss.
        terms: Likewise, but gradients will flow to those of this worker, so they must
            stay what they are.
        state: Nest of tensors of the same shapes on all towers, merged by rules.
    """

    gradients: list[Any]
    by_rows: Any
    numbers: Any
    terms: Any
    state: Any


class TowerResult(Protocol):
    """What a tower returns, as far as workers exchange it."""

    def message(self) -> Message:
        """What the other workers need of it."""
        ...

    def received(self, message: Message) -> Any:
        """A result like this one, of the tower that the message is from."""
        ...


Result = TypeVar("Result", bound=TowerResult)


class AnyWorkers(Protocol):
    """The workers of a cluster, seen from one of them; or what stands for them without others.

    Attributes:
        index: Int, the number of this worker. Number 0 is the chief.
        size: Int, the number of workers.
        first: Int, the number of this worker's first tower among those of all.
        towers: Int, the number of towers of all workers.
        chief: Bool, whether this worker writes files.
        feeds_own_rows: Bool, whether each worker feeds its own rows.
        timeout: Float, seconds after which a worker gives up waiting for another.
    """

    index: int
    size: int
    first: int
    towers: int
    chief: bool
    feeds_own_rows: bool
    timeout: float

    def cut(self, batch: Any, whole: Collection[str], *, fed_here: bool) -> Shards:
        """Shards a batch: the parts of this worker, the rows of all."""
        ...

    def join(self, results: list[Result], kind: str, shards: Shards) -> list[Result]:
        """From the results of the towers here to those of all."""
        ...

    def add_up(self, columns: Columns) -> Columns:
        """Adds gradients up over all towers of all workers."""
        ...

    def shared(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Values that every worker has, with gradients that are summed over the workers."""
        ...

    def whole_batch(self, data: Any) -> Any:
        """Puts the rows of all workers one after the other, where each feeds its own."""
        ...

    def own_rows(self, outputs: Any, data: Any) -> Any:
        """Takes this worker's rows out of those of all."""
        ...
