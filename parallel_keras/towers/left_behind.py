"""Tensors that `call` leaves on layers, for a loss or a metric to read: outputs by another way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

# By the number of the layer and the path of the attribute, such as "3" and "states/0".
Left = dict[str, dict[str, Any]]
# Where Keras and TensorFlow keep what is theirs.
_PASSED_OVER = frozenset(
    {"_losses", "_losses_override", "_tracker", "_inbound_nodes", "_outbound_nodes"}
)
_OF_CHECKPOINTS = "_self_"


@contextlib.contextmanager
def noting(layers: Sequence[keras.layers.Layer]) -> Iterator[Left]:
    """Finds what a call leaves on layers, and takes it away again.

    In a tower such a tensor holds some rows only, and nobody outside of its graph may use it.

    Args:
        layers: All layers of the model that is called inside.

    Yields:
        What was left: empty inside, filled afterwards.
    """
    left: Left = {}
    before = [_attributes(layer) for layer in layers]
    copies = [{name: _copy(value) for name, value in held.items()} for held in before]
    yield left
    for number, (layer, held, copied) in enumerate(zip(layers, before, copies, strict=True)):
        for name, value in _attributes(layer).items():
            known = dict(_tensors(name, copied.get(name)))
            found = {path: one for path, one in _tensors(name, value) if known.get(path) is not one}
            if not found:
                continue
            left.setdefault(str(number), {}).update(found)
            if tf.is_tensor(value) and name not in held:
                del vars(layer)[name]
            elif tf.is_tensor(value) or held.get(name) is value:
                vars(layer)[name] = copied[name]


def put(layers: Sequence[keras.layers.Layer], left: Left) -> None:
    """Leaves merged tensors where a call on one device would have.

    Args:
        layers: All layers of the model.
        left: The merged tensors.
    """
    for number, tensors in left.items():
        attributes = vars(layers[int(number)])
        for path, tensor in tensors.items():
            name, *rest = path.split("/")
            attributes[name] = _with(attributes.get(name), rest, tensor)


def name_of(layers: Sequence[keras.layers.Layer], path: str) -> str:
    """What an error says of a tensor that was left.

    Args:
        layers: All layers of the model.
        path: The number of the layer and the path of the attribute, with a slash between.
    """
    number, _, attribute = path.partition("/")
    return f"attribute {attribute!r} of layer {layers[int(number)].name!r}"


def _attributes(layer: keras.layers.Layer) -> dict[str, Any]:
    """What can hold tensors that a call left."""
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in _PASSED_OVER and not name.startswith(_OF_CHECKPOINTS)
    }


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{path}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{path}/{index}", item)
    elif tf.is_tensor(value) and not isinstance(value, (tf.Variable, keras.Variable)):
        yield path, value


def _copy(value: Any) -> Any:
    """The same containers once more, with the same things in them."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _with(value: Any, path: list[str], tensor: Any) -> Any:
    """A container like this one with a tensor in it; TensorFlow forbids to replace some."""
    if not path:
        return tensor
    first, *rest = path
    if isinstance(value, dict):
        key = next((key for key in value if str(key) == first), first)
        return {**value, key: _with(value.get(key), rest, tensor)}
    items, index = list(value or []), int(first)
    items[index : index + 1] = [_with(items[index] if index < len(items) else None, rest, tensor)]
    return tuple(items) if isinstance(value, tuple) else items
