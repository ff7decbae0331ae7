"""From nests of tensors to one vector that workers add up, and back. Pure: knows nothing of models.

What is to be added is laid side by side. What is to be gathered is laid side by
side too, each tower's in a place of its own, with zeros in the places of the
others: the sum of those is everything from everyone. So one sum moves all of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# For each tower, or each worker, a list of tensors.
Slots = list[list[Any]]

# How finely `bucket` rounds.
_STEPS_AN_OCTAVE = 8
_LARGEST_EXPONENT = 31


def encode(tensor: tf.Tensor) -> tf.Tensor:
    """Any numbers as a float32 vector that survives having zeros added.

    float32 and smaller types are exact as they are; of others each 16 bits
    become a number, because collectives know few types and one message is
    quicker than two.

    Args:
        tensor: Dense tensor of numbers or booleans.

    Returns:
        A float32 tensor of shape `(pieces,)`.

    Raises:
        ValueError: For strings and other types that are no numbers.
    """
    if tensor.dtype in (tf.string, tf.resource, tf.variant):
        raise ValueError(
            "Expected numbers where workers exchange values. "
            f"Received: a tensor of dtype={tensor.dtype.name}. "
            "Turn strings into numbers before they reach the model, and back outside of it."
        )
    if not _has_pieces(tensor.dtype):
        return tf.reshape(tf.cast(tensor, tf.float32), [-1])
    return tf.reshape(tf.cast(tf.bitcast(tensor, tf.uint16), tf.float32), [-1])


def decode(vector: tf.Tensor, dtype: tf.DType, shape: Any) -> tf.Tensor:
    """The inverse of `encode`.

    Args:
        vector: float32 tensor of shape `(pieces,)`.
        dtype: Of the tensor that was encoded.
        shape: Of the tensor that was encoded, ints or an int tensor.

    Returns:
        The tensor.

    Example:
    >>> from parallel_keras.workers import exchange
    >>> big = tf.constant([2**40 + 1, -3], tf.int64)
    >>> exchange.decode(exchange.encode(big), tf.int64, [2]).numpy().tolist()
    [1099511627777, -3]
    """
    if not _has_pieces(dtype):
        return tf.cast(tf.reshape(vector, shape), dtype)
    pieces = tf.cast(tf.reshape(vector, [-1, dtype.size // 2]), tf.uint16)
    return tf.reshape(tf.bitcast(pieces, dtype), shape)


def pieces(dtype: tf.DType) -> int:
    """How many float32 numbers `encode` makes of one number of this type."""
    return dtype.size // 2 if _has_pieces(dtype) else 1


def _has_pieces(dtype: tf.DType) -> bool:
    return dtype.size > 2 and dtype != tf.float32


def bucket(size: tf.Tensor) -> tf.Tensor:
    """Rounds a size up, so that sizes that vary are few: by less than an eighth.

    TensorFlow keeps a record for each size of vector that was ever reduced.

    Args:
        size: int32 tensor of shape `()`.

    Returns:
        An int32 tensor of shape `()`.

    Example:
    >>> from parallel_keras.workers import exchange
    >>> [int(exchange.bucket(tf.constant(size))) for size in (0, 7, 1000, 1025)]
    [1, 7, 1024, 1152]
    """
    powers = tf.constant([2**exponent for exponent in range(_LARGEST_EXPONENT)], tf.int32)
    octave = tf.reduce_max(tf.where(powers <= size, powers, tf.ones_like(powers)))
    step = tf.maximum(octave // _STEPS_AN_OCTAVE, 1)
    return tf.maximum((size + step - 1) // step * step, 1)


def size_of(tensor: tf.Tensor) -> Any:
    """The number of elements: an int where it is known while tracing."""
    known = tensor.shape.num_elements()
    return tf.size(tensor) if known is None else known


class Writer:
    """Lays vectors side by side into one message.

    Args:
        dtype: Of the message.
    """

    def __init__(self, dtype: tf.DType = tf.float32) -> None:
        self._dtype = dtype
        self._vectors: list[tf.Tensor] = []
        self.size: Any = 0

    def add(self, vector: tf.Tensor) -> None:
        """Appends a tensor, flat."""
        self.size += size_of(vector)
        self._vectors.append(tf.reshape(vector, [-1]))

    def skip(self, size: Any) -> None:
        """Leaves a place that another worker fills."""
        if not isinstance(size, int) or size:
            self.add(tf.zeros([size], self._dtype))

    def message(self, varied: Any = 0) -> tf.Tensor:
        """The vector, rounded up in size where the size is not known while tracing.

        Args:
            varied: How many of its numbers there may be more or less of the next time. Only
                they are rounded up, so that weights are not sent with empty places. Defaults
                to all, where the size is not known.
        """
        if not isinstance(varied, int):
            self.skip(bucket(varied) - varied)
        elif not isinstance(self.size, int):
            self.skip(bucket(self.size) - self.size)
        return tf.concat(self._vectors, axis=0) if self._vectors else tf.zeros([0], self._dtype)


class Reader:
    """Takes a message apart, in the order in which it was written.

    Args:
        message: The vector.
    """

    def __init__(self, message: tf.Tensor) -> None:
        self._message = message
        self._at: Any = 0

    def take(self, size: Any) -> tf.Tensor:
        """The next numbers."""
        start = self._at
        self._at += size
        return self._message[start : self._at]


def exchange(
    reduce: Callable[..., tf.Tensor],
    sums: Sequence[tf.Tensor],
    fixed: Slots,
    varied: Slots,
    first: int,
    total: int,
) -> tuple[list[tf.Tensor], Slots, Slots]:
    """Adds up and gathers over all workers, by one sum (and one for float64).

    Args:
        reduce: Function from a vector, and a topic where it is not the message
            itself, to its sum over all workers.
        sums: Float tensors to be added up, of one shape on all workers.
        fixed: For each slot of this worker tensors of the same shapes in all slots.
        varied: For each slot of this worker tensors of any shapes, with the same
            ranks in all slots. Their sizes are exchanged first.
        first: Int, the number of the first slot of this worker.
        total: Int, the number of slots of all workers.

    Returns:
        The sums, and for each slot of all workers its tensors.
    """
    shapes = _shapes(reduce, varied, first, total)
    sizes = [_sizes(varied[0], slot) for slot in shapes]
    narrow, wide = Writer(), Writer(tf.float64)
    for value in sums:
        _for(value, narrow, wide).add(value if value.dtype == tf.float64 else _narrow(value))
    step = sum((pieces(x.dtype) * size_of(x) for x in fixed[0]), start=0) if fixed else 0
    narrow.skip(first * step)
    for value in (value for slot in fixed for value in slot):
        narrow.add(encode(value))
    narrow.skip((total - first - len(fixed)) * step)
    narrow.skip(_sum(sizes[:first]))
    for value in (value for slot in varied for value in slot):
        narrow.add(encode(value))
    narrow.skip(_sum(sizes[first + len(varied) :]))
    # Counted from what all workers were told, and not from shapes that one may know by itself.
    news, wide_news = Reader(_reduced(reduce, narrow, _sum(sizes))), Reader(_reduced(reduce, wide))
    return (
        [_read_sum(value, _for(value, news, wide_news)) for value in sums],
        [[_read_like(news, x) for x in fixed[0]] for _ in range(total)] if fixed else [],
        [
            [_read(news, x, shape) for x, shape in zip(varied[0], slot, strict=True)]
            for slot in shapes
        ],
    )


def _reduced(reduce: Callable[..., tf.Tensor], writer: Writer, varied: Any = 0) -> tf.Tensor:
    message = writer.message(varied)
    return message if isinstance(writer.size, int) and not writer.size else reduce(message)


def _shapes(reduce: Callable[..., tf.Tensor], varied: Slots, first: int, total: int) -> Slots:
    """For each slot of all workers the shapes of its tensors."""
    if not varied or not varied[0]:
        return [[] for _ in range(total)] if varied else []
    ranks = [value.shape.rank for value in varied[0]]
    sizes = [[tf.concat([tf.shape(value) for value in slot], axis=0)] for slot in varied]
    _, slots, _ = exchange(lambda message: reduce(message, "sizes"), [], sizes, [], first, total)
    return [tf.split(slot, ranks) for (slot,) in slots]


def _sizes(values: Sequence[tf.Tensor], shapes: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    pairs = zip(values, shapes, strict=True)
    return [pieces(value.dtype) * tf.reduce_prod(shape) for value, shape in pairs]


def _sum(sizes: Sequence[Sequence[Any]]) -> Any:
    return sum((size for slot in sizes for size in slot), start=0)


def _for(value: tf.Tensor, narrow: Any, wide: Any) -> Any:
    return wide if value.dtype == tf.float64 else narrow


def _narrow(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(value, tf.float32)


def _read_sum(value: tf.Tensor, news: Reader) -> tf.Tensor:
    summed = tf.reshape(news.take(size_of(value)), tf.shape(value))
    return tf.ensure_shape(tf.cast(summed, value.dtype), value.shape)


def _read_like(news: Reader, like: tf.Tensor) -> tf.Tensor:
    known = like.shape.is_fully_defined()
    vector = news.take(pieces(like.dtype) * size_of(like))
    return decode(vector, like.dtype, like.shape if known else tf.shape(like))


def _read(news: Reader, like: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    return decode(news.take(pieces(like.dtype) * tf.reduce_prod(shape)), like.dtype, shape)
