"""What to call something that a model keeps, in an error."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat

_DEPTH = 4
# Tables that a call can change.
TABLES = (tf.lookup.experimental.MutableHashTable, tf.lookup.experimental.DenseHashTable)


def name_of(template: keras.Model, handle: tf.Tensor) -> str:
    """The attribute and the layer that hold what a handle belongs to.

    Args:
        template: The model.
        handle: The handle of a variable or table.

    Returns:
        Words for a sentence.
    """
    for layer in reversed(_compat.all_layers(template)):
        for path, value in kept_by(layer):
            if getattr(value, "handle", None) is handle or (
                getattr(value, "resource_handle", None) is handle
            ):
                return f"{path!r} of layer {layer.name!r}"
    return "something that no layer has as an attribute"


class Outside:
    """What a model keeps outside of Keras: `tf.Variable`s and tables that change.

    Args:
        template: The model.
    """

    def __init__(self, template: keras.Model) -> None:
        known = {id(variable.value) for variable in template.variables}
        self._found: dict[int, tuple[str, Any]] = {}
        for layer in reversed(_compat.all_layers(template)):
            for path, value in kept_by(layer):
                if isinstance(value, (tf.Variable, *TABLES)) and id(value) not in known:
                    self._found.setdefault(id(value), (f"{path!r} of layer {layer.name!r}", value))

    def values(self) -> list[tuple[str, bool, list[Any]]]:
        """What is in them now: words for a sentence, whether it is a table, and arrays."""
        return [
            (name, isinstance(value, TABLES), _arrays(value))
            for name, value in self._found.values()
        ]


def _arrays(value: Any) -> list[Any]:
    parts = [value] if isinstance(value, tf.Variable) else value.export()
    return [part.numpy() for part in parts]


def kept_by(layer: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """What a layer has as attributes, also in lists, dicts and objects; not its sublayers.

    Args:
        layer: The layer.

    Yields:
        Pairs of a path and what is there.
    """
    waiting: list[tuple[str, Any, int]] = [("", layer, 0)]
    seen = {id(layer)}
    while waiting:
        path, value, depth = waiting.pop(0)
        for name, child in _inside(value):
            if id(child) in seen or isinstance(child, _OTHERS):
                continue
            seen.add(id(child))
            yield f"{path}{name}", child
            if depth < _DEPTH and not isinstance(child, tf.Variable):
                waiting.append((f"{path}{name}.", child, depth + 1))


# A module holds what is everybody's, and some import more of it when they are asked.
_OTHERS = (
    *(keras.layers.Layer, keras.Variable, keras.optimizers.Optimizer),
    *(tf.Tensor, str, type, types.ModuleType),
)


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(value)]
    return list(getattr(value, "__dict__", {}).items())
