"""Few, large messages: small tensors go from one device to another as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from parallel_keras import merge
from parallel_keras.graphs.graph import is_handle
from parallel_keras.homes.links import are_far

# Over PCIe 4 a message of 1 MiB takes 40 microseconds, of which some 10 are the same whatever its
# size: smaller ones pay more for travelling alone than a copy into a common vector costs.
LARGE = 2**20
# What is packed leaves when all of it is there. So that gradients of late layers can leave early,
# a vector has no more than this, which is large enough for the fixed costs not to count.
FULL = 4 * 2**20


class Packed:
    """Tensors of one device, packed for others.

    Args:
        tensors: Tensors, all on that device.
        source: Its name.
    """

    def __init__(self, tensors: Sequence[tf.Tensor], source: str) -> None:
        self._tensors, self._source = list(tensors), source
        self._vectors: list[tuple[list[int], tf.Tensor]] | None = None

    def at(self, target: str) -> list[tf.Tensor]:
        """The tensors on another device.

        Args:
            target: Its name.

        Returns:
            A list of tensors.
        """
        with tf.device(target):
            if not are_far((self._source, target)):
                return list(tf.identity_n(self._tensors)) if self._tensors else []
            arrived: dict[int, tf.Tensor] = {}
            for indices, vector in self._pack():
                arrived.update(zip(indices, self._unpack(indices, vector), strict=True))
            return [
                # Each by itself, so that none waits for the others.
                arrived[index] if index in arrived else tf.identity(tensor)
                for index, tensor in enumerate(self._tensors)
            ]

    def _pack(self) -> list[tuple[list[int], tf.Tensor]]:
        if self._vectors is None:
            with tf.device(self._source):
                self._vectors = [
                    (indices, _as_vector([self._tensors[index] for index in indices]))
                    for indices in bundles(self._tensors)
                ]
        return self._vectors

    def _unpack(self, indices: list[int], vector: tf.Tensor) -> list[tf.Tensor]:
        return _from_vector(vector, [self._tensors[index].shape for index in indices])


class Copies:
    """What the towers read weights from, from the homes of the weights to each tower.

    Args:
        sources: What `Tables.source` returned for each variable: a value, or a handle,
            which is the same on every device.
        homes: The device of each.
    """

    def __init__(self, sources: Sequence[tf.Tensor], homes: Sequence[str]) -> None:
        self._sources = list(sources)
        self._groups: dict[str, list[int]] = {}
        for index, (source, home) in enumerate(zip(sources, homes, strict=True)):
            if not is_handle(source):
                self._groups.setdefault(home, []).append(index)
        self._packed = {
            home: Packed([self._sources[index] for index in indices], home)
            for home, indices in self._groups.items()
        }

    def at(self, device: str) -> list[tf.Tensor]:
        """What a tower on a device reads, in the order of the sources; handles stay handles."""
        if not any(are_far((home, device)) for home in self._groups):
            values = [source for source in self._sources if not is_handle(source)]
            with tf.device(device):
                copied = iter(tf.identity_n(values) if values else [])
            return [source if is_handle(source) else next(copied) for source in self._sources]
        found = list(self._sources)
        for home, indices in self._groups.items():
            for index, value in zip(indices, self._packed[home].at(device), strict=True):
                found[index] = value
        return found

    def values_at(self, device: str) -> list[tf.Tensor]:
        """The values alone, without the handles."""
        return [value for value in self.at(device) if not is_handle(value)]


def carried(nest: Any, source: str, target: str) -> Any:
    """A nest of dense tensors, brought from one device to another.

    Args:
        nest: Nest of tensors.
        source: The device they are on.
        target: The device they are needed on.

    Returns:
        The nest; as it is where nothing has to travel.
    """
    tensors = tf.nest.flatten(nest)
    if len(tensors) < 2 or not are_far((source, target)):
        return nest
    return tf.nest.pack_sequence_as(nest, Packed(tensors, source).at(target))


def sums(
    columns: Sequence[Sequence[Any]], sources: Sequence[str], homes: Sequence[str]
) -> list[Any]:
    """Adds up the gradients of each weight where the weight lives.

    Args:
        columns: For each weight its gradient on each tower: a tensor, `tf.IndexedSlices`
            or `None`.
        sources: The device of each tower.
        homes: The home of each weight.

    Returns:
        For each weight the sum, on its home.
    """
    found: list[Any] = [None] * len(columns)
    for home in dict.fromkeys(homes):
        indices = [index for index, where in enumerate(homes) if where == home]
        packs = []
        if len(sources) > 1 and are_far((home, *sources)):
            packs = [index for index in indices if _is_alike(columns[index])]
        gone: set[int] = set()
        for places in bundles([columns[index][0] for index in packs]):
            chosen = [packs[place] for place in places]
            found_here = _sum_of_vectors([columns[index] for index in chosen], sources, home)
            for index, value in zip(chosen, found_here, strict=True):
                found[index] = value
            gone.update(chosen)
        with tf.device(home):
            for index in indices:
                if index not in gone:
                    found[index] = merge.total(columns[index])
    return found


def bundles(tensors: Sequence[tf.Tensor]) -> list[list[int]]:
    """Which tensors travel together: small ones of one dtype, in order.

    Args:
        tensors: Tensors.

    Returns:
        Lists of at least two indices. Those in none of them travel alone.
    """
    full: list[list[int]] = []
    filling: dict[tf.DType, tuple[int, list[int]]] = {}
    for index, tensor in enumerate(tensors):
        dtype = tensor.dtype
        if dtype in (tf.string, tf.resource, tf.variant) or not tensor.shape.is_fully_defined():
            continue
        size = tensor.shape.num_elements() * dtype.size
        if size >= LARGE:
            continue
        filled, indices = filling.get(dtype, (0, []))
        if filled + size > FULL:
            full.append(indices)
            filled, indices = 0, []
        filling[dtype] = filled + size, [*indices, index]
    full += [indices for _, indices in filling.values()]
    return [indices for indices in full if len(indices) > 1]


def _is_alike(column: Sequence[Any]) -> bool:
    if len(column) < 2 or not all(isinstance(value, tf.Tensor) for value in column):
        return False
    known = all(value.shape.is_fully_defined() for value in column)
    return known and len({(value.dtype, tuple(value.shape)) for value in column}) == 1


def _sum_of_vectors(
    columns: Sequence[Sequence[tf.Tensor]], sources: Sequence[str], home: str
) -> list[tf.Tensor]:
    vectors = []
    for tower, source in enumerate(sources[: len(columns[0])]):
        with tf.device(source):
            vectors.append(_as_vector([column[tower] for column in columns]))
    with tf.device(home):
        return _from_vector(tf.add_n(vectors), [column[0].shape for column in columns])


def _as_vector(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


def _from_vector(vector: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> list[tf.Tensor]:
    parts = tf.split(vector, [shape.num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
