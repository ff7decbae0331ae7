"""What to call something that a model keeps, in an error."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
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
        for path, value in [*kept_by(layer), *used_by(layer)]:
            if getattr(value, "handle", None) is handle or (
                getattr(value, "resource_handle", None) is handle
            ):
                return f"{path!r} of layer {layer.name!r}"
    # Asking makes one where there is none, so it comes last.
    if tf.random.get_global_generator().state.handle is handle:
        return "the generator of tf.random.get_global_generator()"
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
            for path, value in [*kept_by(layer), *used_by(layer)]:
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


def used_by(layer: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """What the code of a layer uses that is no attribute of it: globals, and what encloses it.

    Args:
        layer: The layer.

    Yields:
        Pairs of a name and what is there.
    """
    waiting = [child for _, child in kept_by(layer) if callable(child)]
    for kind in type(layer).__mro__:
        if not _is_of_others(kind.__module__):
            waiting += vars(kind).values()
    seen: set[int] = set()
    while waiting:
        for name, value in _named_in(waiting.pop()):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
                yield from _held(name, value, _DEPTH)


def _held(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """A value and what it holds, by path."""
    yield name, value
    if depth and isinstance(value, _HOLDERS):
        for inner, child in _inside(value):
            yield from _held(f"{name}.{inner}", child, depth - 1)


def _named_in(function: Any) -> list[tuple[str, Any]]:
    """The values that a function's code names outside of it; none of functions of libraries."""
    function = inspect.unwrap(getattr(function, "python_function", function))
    if not isinstance(function, types.FunctionType) or _is_of_others(function.__module__):
        return []
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    found = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if (content := _content(cell)) is not None:
            found[name] = content
    return list(found.items())


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Nothing is in it yet.
        return None


def _is_of_others(module: Any) -> bool:
    return str(module).split(".")[0] in ("builtins", "keras", "tensorflow", "numpy")


_HOLDERS = (list, dict, tuple, tf.Module, tf.random.Generator)
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


class Names:
    """Tells from the name of an operation which layer it belongs to.

    Args:
        template: The model.
    """

    def __init__(self, template: keras.Model) -> None:
        self._layers = {layer.name: layer for layer in _compat.all_layers(template)}

    def layer(self, operation: str) -> keras.layers.Layer | None:
        """The innermost layer in whose call an operation was made, if any.

        Args:
            operation: Its name.
        """
        parts = operation.split("/")[:-1]
        if parts[:1] == ["gradient_tape"]:
            return None
        for part in reversed(parts):
            # TensorFlow numbers names that occur again.
            for name in (part, part.rpartition("_")[0]):
                if name in self._layers:
                    return self._layers[name]
        return None

    def may_mix(self, operation: tf.Operation) -> bool:
        """Whether it was made by code of the user's, or goes over an axis that the user chose.

        Args:
            operation: An operation of a tower.
        """
        layer = self.layer(operation.name)
        if layer is None:
            return False
        of_keras = type(layer).__module__.startswith("keras.")
        if not of_keras or isinstance(layer, (keras.Model, keras.layers.Lambda)):
            return True
        axis: Any = getattr(layer, "axis", -1)
        axes: Sequence[Any] = axis if isinstance(axis, (list, tuple)) else [axis]
        return 0 in axes and not isinstance(layer, keras.layers.BatchNormalization)
