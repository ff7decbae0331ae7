"""From the results of the towers of one worker to those of all workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from parallel_keras import merge, slices
from parallel_keras.nests import replaced, tensors
from parallel_keras.shard import Shards
from parallel_keras.workers.feeding import check_marks
from parallel_keras.workers.message import Columns, Message, Result


class MarkedShards(Shards):
    """The `Shards` of a batch that all workers must have.

    Attributes:
        mark: What tells the batch from others, see `feeding.mark`.
    """

    mark: tf.Tensor

    @classmethod
    def of(cls, shards: Shards, mark: tf.Tensor) -> MarkedShards:
        """The same shards, marked."""
        marked = cls(*shards)
        marked.mark = mark
        return marked


def join(workers: Any, results: Sequence[Result], kind: str, shards: Shards) -> list[Result]:
    """From the results of the towers of this worker to those of all, in one exchange.

    Args:
        workers: The `Workers`.
        results: What each tower here returned.
        kind: One of `KINDS`.
        shards: What the towers were given.

    Returns:
        The results of all towers of all workers. The first has the sum of the gradients.
    """
    messages = [result.message() for result in results]
    everyone = exchange_messages(workers, messages, kind, shards)
    last = len(results) - 1
    # Another worker's result is like the one of the tower here that is nearest to it.
    like = [results[min(max(tower - workers.first, 0), last)] for tower in range(len(everyone))]
    return [result.received(told) for result, told in zip(like, everyone, strict=True)]


def exchange_messages(
    workers: Any, messages: list[Message], kind: str, shards: Shards
) -> list[Message]:
    """Tells the other workers what the towers here have for them, and hears theirs.

    Args:
        workers: The `Workers`.
        messages: One for each tower here.
        kind: One of `KINDS`.
        shards: What the towers were given.

    Returns:
        The messages of all towers of all workers.
    """
    columns = [list(column) for column in zip(*[m.gradients for m in messages], strict=True)]
    dense, sparse = _kinds_of_gradients(columns)
    if isinstance(shards, MarkedShards):
        mark = shards.mark
    else:
        mark = None
        if workers.feeds_own_rows and shards.rows:
            here = shards.rows[workers.first : workers.first + workers.here]
            some = tf.add_n(here) > 0
            dense = {index: _only(value, some) for index, value in dense.items()}
            messages = [_only_numbers(message, some) for message in messages]
    alike = [(m.numbers, m.terms, m.state, mark) for m in messages]
    varied = [
        (message.by_rows, [columns[index][tower] for index in sparse])
        for tower, message in enumerate(messages)
    ]
    sums, heard_alike, heard_varied = workers.exchange(
        kind, list(dense.values()), [tensors(a) for a in alike], [tensors(v) for v in varied]
    )
    joined, marks = [], []
    for tower, (numbers, rest) in enumerate(zip(heard_alike, heard_varied, strict=True)):
        at = tower - workers.first
        here = 0 <= at < workers.here
        losses, terms, state, heard_mark = replaced(alike[at if here else 0], numbers)
        # Sparse gradients are those heard, here too: of its own, TensorFlow would put the sums
        # within a tower and over towers together, and round otherwise than other workers do.
        by_rows, slices = replaced(varied[at if here else 0], rest)
        by_rows = varied[at][0] if here else by_rows
        gradients: list[Any] = [None] * len(columns)
        for position, index in enumerate(sparse):
            gradients[index] = slices[position]
        terms = messages[at].terms if here else terms
        joined.append(Message(gradients, by_rows, losses, terms, state))
        marks.append(heard_mark)
    for index, value in zip(dense, sums, strict=True):
        joined[0].gradients[index] = value
    check_marks(marks, workers)
    return joined


def _kinds_of_gradients(columns: Columns) -> tuple[dict[int, tf.Tensor], list[int]]:
    """The sums of dense gradients by the number of the weight; the numbers of sparse ones."""
    present = {
        index: column
        for index, column in enumerate(columns)
        if any(value is not None for value in column)
    }
    sparse = [
        index
        for index, column in present.items()
        if all(slices.is_sparse(value) for value in column)
    ]
    dense = {
        index: tf.convert_to_tensor(merge.total(column))
        for index, column in present.items()
        if index not in sparse
    }
    return dense, sparse


def _only(value: Any, some: tf.Tensor) -> Any:
    """Zeros instead of the floats of a worker that has no rows: theirs may be NaN."""
    return tf.where(some, value, tf.zeros_like(value)) if value.dtype.is_floating else value


def _only_numbers(message: Message, some: tf.Tensor) -> Message:
    numbers, terms = tf.nest.map_structure(
        lambda value: _only(value, some), (message.numbers, message.terms)
    )
    return Message(message.gradients, message.by_rows, numbers, terms, message.state)
