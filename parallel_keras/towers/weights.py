"""What the towers read weights from: copies on their device, or a large table where it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling, is_handle

if TYPE_CHECKING:
    from parallel_keras.towers.scope import TowerScope

# A smaller table is copied as a whole with the other weights: over PCIe 4 that takes less than
# 50 microseconds, and a tower would wait about as long for a lookup on another device.
SMALLEST_TABLE = 2**20


class Tables:
    """The embedding tables of a model that stay where they are: only their rows travel.

    A copy of a table with millions of rows on each device, at each step, takes memory
    and time for rows that nobody looks up. And TensorFlow copies a variable whose
    rows have been updated one by one whenever it is read as a whole.

    Args:
        template: The model. Its tables are those of `keras.layers.Embedding` of at least
            `SMALLEST_TABLE` bytes, also where they are read in other ways, too.
    """

    def __init__(self, template: keras.Model) -> None:
        layers = [layer for layer in _compat.all_layers(template) if _looks_up(layer)]
        # What a table is and where, as it is outside of any scope that stands in for it.
        self._tables = [_Table(layer, layer.embeddings, layer.embeddings.dtype) for layer in layers]

    def source(self, variable: keras.Variable, home: str) -> tf.Tensor:
        """What a tower gets for a variable.

        Args:
            variable: A variable of the model.
            home: The device that it lives on.

        Returns:
            The handle of a table, a resource tensor of shape `()`, which is the same on
            every device; the value of any other variable, to be copied to the devices.
        """
        for table in self._tables:
            if table.variable is variable:
                table.device = home
                return variable.value.handle
        return read(variable, home)

    @contextlib.contextmanager
    def looking_up(self, scope: TowerScope) -> Iterator[None]:
        """Inside, layers look rows up in their tables, where the tower was given handles.

        Args:
            scope: The scope of the tower.
        """
        with contextlib.ExitStack() as stack:
            for table in self._tables:
                if scope.handle(table.variable) is not None:
                    look_up = functools.partial(table.look_up, table.layer.call, scope)
                    stack.enter_context(calling(table.layer, look_up))
            yield


@dataclasses.dataclass
class _Table:
    layer: keras.layers.Embedding
    variable: keras.Variable
    dtype: str
    device: str = ""

    def look_up(self, original: Callable[[Any], Any], scope: TowerScope, inputs: Any) -> Any:
        """What the layer's `call` returns; there, too, negative ids count from the end."""
        handle = scope.handle(self.variable)
        if not isinstance(inputs, tf.Tensor) or id(self.variable) in scope.updates:
            return original(inputs)
        ids = inputs if inputs.dtype in (tf.int32, tf.int64) else tf.cast(inputs, tf.int32)
        ids = tf.where(ids < 0, ids + self.variable.shape[0], ids)
        # Not on the device of the tower: ids go to the table, and rows come back.
        with tf.device(self.device):
            rows = tf.raw_ops.ResourceGather(resource=handle, indices=ids, dtype=self.dtype)
        rows.set_shape([*ids.shape, *self.variable.shape[1:]])
        return tf.cast(rows, self.layer.compute_dtype)


def read(variable: keras.Variable, home: str) -> tf.Tensor:
    """The value of a variable, read where it lives.

    Args:
        variable: The variable.
        home: The device that it lives on.

    Returns:
        A tensor.
    """
    with tf.device(home or None):
        return tf.convert_to_tensor(variable.value)


def value_of(source: tf.Tensor | None, variable: keras.Variable, home: str) -> tf.Tensor:
    """The value of a variable, read unless that is what the towers were given.

    Args:
        source: What `Tables.source` returned for it, `None` if it was not asked.
        variable: The variable.
        home: The device that it lives on.

    Returns:
        A tensor.
    """
    return read(variable, home) if source is None or is_handle(source) else source


def _looks_up(layer: keras.layers.Layer) -> bool:
    # A subclass with a `call` of its own may do anything with its table.
    if getattr(type(layer), "call", None) is not keras.layers.Embedding.call or not layer.built:
        return False
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return False
    table = layer.embeddings
    size = tf.as_dtype(table.dtype).size * table.shape.num_elements()
    return bool(size >= SMALLEST_TABLE)
