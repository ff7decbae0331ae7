"""Tensors that `call` leaves on layers, for a loss or a metric to read: outputs by another way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from parallel_keras.towers.reachable import (
    ABSENT,
    changed,
    children,
    functions_of,
    holds_nothing,
    is_container,
    is_tensor,
    restored,
)

# By the number of the layer and the path of the attribute, such as "3" and "states/0".
Left = dict[str, dict[str, Any]]
# Where Keras and TensorFlow keep what is theirs.
_PASSED_OVER = frozenset(
    {"_losses", "_losses_override", "_tracker", "_inbound_nodes", "_outbound_nodes"}
)
_OF_CHECKPOINTS = "_self_"
# Objects in objects in objects are looked into, and no further.
_DEPTH = 6


@contextlib.contextmanager
def noting(layers: Sequence[keras.layers.Layer]) -> Iterator[Left]:
    """Finds what a call leaves on layers, and takes it away again.

    In a tower such a tensor holds some rows only, and nobody outside of its graph may use it.
    It may also be in a container or an object that a layer has, or in one that its methods know
    from the functions or the module around them.

    Args:
        layers: All layers of the model that is called inside.

    Yields:
        What was left: empty inside, filled afterwards.
    """
    left: Left = {}
    seen: set[int] = set()
    old: dict[int, Any] = {}
    before = [_before(layer, _spaces(layer), seen, old) for layer in layers]
    yield left
    # What was there before may have been moved; held above, it is no other with the same id.
    seen = set(old)
    for number, (layer, held) in enumerate(zip(layers, before, strict=True)):
        found = left[str(number)] = {}
        for name, value in _spaces(layer).items():
            tensors = dict(_tensors(name, value, seen))
            if tensors:
                found.update(tensors)
                _take_away(layer, name, value, held.inside)
        if not found:
            del left[str(number)]


def put(layers: Sequence[keras.layers.Layer], left: Left) -> None:
    """Leaves merged tensors where a call on one device would have.

    Args:
        layers: All layers of the model.
        left: The merged tensors.
    """
    for number, tensors in left.items():
        layer = layers[int(number)]
        for path, tensor in tensors.items():
            name, *rest = path.split("/")
            held = _spaces(layer).get(name)
            value = _with(held, rest, tensor)
            if type(held) is int and hasattr(value, "numpy"):
                value = int(value)
            if name not in functions_of(type(layer)):
                vars(layer)[name] = value


def name_of(layers: Sequence[keras.layers.Layer], path: str) -> str:
    """What an error says of a tensor that was left.

    Args:
        layers: All layers of the model.
        path: The number of the layer and the path of the attribute, with a slash between.
    """
    number, _, attribute = path.partition("/")
    return f"attribute {attribute!r} of layer {layers[int(number)].name!r}"


@dataclasses.dataclass
class _Held:
    """What was in a layer, a container or an object before a call."""

    value: Any
    inside: dict[str, Any]


def _spaces(layer: keras.layers.Layer) -> dict[str, Any]:
    """What can hold tensors that a call left: attributes, and the methods of the user's own."""
    attributes = {
        name: value
        for name, value in vars(layer).items()
        if name not in _PASSED_OVER and not name.startswith(_OF_CHECKPOINTS)
    }
    return {**functions_of(type(layer)), **attributes}


def _before(
    value: Any, inside: dict[str, Any], seen: set[int], old: dict[int, Any], depth: int = 0
) -> _Held:
    seen.add(id(value))
    held = {}
    for name, child in inside.items():
        if holds_nothing(child):
            held[name] = child
            continue
        if is_tensor(child):
            old[id(child)] = child
        further = None if depth == _DEPTH or id(child) in seen else children(child)
        held[name] = child if further is None else _before(child, further, seen, old, depth + 1)
    return _Held(value, held)


def _tensors(path: str, value: Any, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The tensors that are new."""
    if holds_nothing(value):
        return
    if is_tensor(value):
        if id(value) not in seen:
            yield path, value
        return
    inside = None if depth == _DEPTH or id(value) in seen else children(value)
    if inside is None:
        return
    seen.add(id(value))
    for name, child in inside.items():
        yield from _tensors(f"{path}/{name}", child, seen, depth + 1)


def _take_away(layer: keras.layers.Layer, name: str, value: Any, held: dict[str, Any]) -> None:
    if is_tensor(value) and name not in held:
        del vars(layer)[name]
    elif name in held and (is_tensor(value) or _original(held[name]) is value):
        old = _restored(value, held[name])
        if name not in functions_of(type(layer)):
            vars(layer)[name] = old


def _original(held: Any) -> Any:
    return held.value if isinstance(held, _Held) else held


def _restored(value: Any, held: Any) -> Any:
    """What there was before, with the same in it; of objects only what tensors have replaced."""
    if not isinstance(held, _Held) or held.value is not value:
        return _original(held)
    inside = children(value) or {}
    olds = {name: _restored(inside.get(name), old) for name, old in held.inside.items()}
    if is_container(value):
        return restored(value, olds)
    lost = {}
    for name, child in inside.items():
        old = olds.get(name, ABSENT)
        changed_inside = name in olds and _original(held.inside[name]) is child
        if old is not child and (changed_inside or is_tensor(child)):
            lost[name] = old
    return restored(value, lost)


def _with(value: Any, path: list[str], tensor: Any) -> Any:
    """A container or an object like this one with a tensor in it."""
    if not path:
        return tensor
    first, *rest = path
    return changed(value, {first: _with((children(value) or {}).get(first), rest, tensor)})
