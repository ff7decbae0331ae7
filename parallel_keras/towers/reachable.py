"""What code of a model can keep things in: containers, objects, variables of functions."""

from __future__ import annotations

import collections
import contextlib
import dis
import enum
import functools
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import keras
import tensorflow as tf

# Objects of these classes hold nothing of the user's, or what is found as itself.
_OTHERS = (
    *(keras.layers.Layer, keras.Variable, keras.metrics.Metric, keras.optimizers.Optimizer),
    *(tf.Variable, tf.Module, type, enum.Enum, BaseException),
)
_LIBRARIES = frozenset({*sys.stdlib_module_names, "keras", "numpy", "parallel_keras", "tensorflow"})
# What can be changed in place without anybody to be told.
_IN_PLACE = (list, dict, collections.deque)
# Stands for something that was not there.
ABSENT = object()
# Most of what layers have is of few classes, and TensorFlow is slow to say what is a tensor.
_HOLD_NOTHING: MutableMapping[type, bool] = weakref.WeakKeyDictionary()
_FROM_TEXT: MutableMapping[str, Any] = {}
_FROM_TEXT_WHILE_ALIVE: MutableMapping[str, Any] = weakref.WeakValueDictionary()


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, and no variable."""
    if isinstance(value, (dict, list, tuple)):  # TensorFlow takes much longer to say so.
        return False
    return tf.is_tensor(value) and not isinstance(value, (tf.Variable, keras.Variable))


def is_container(value: Any) -> bool:
    """Whether a value is a container."""
    return isinstance(value, (Mapping, list, tuple, collections.deque))


def holds_nothing(value: Any) -> bool:
    """Whether a value is no tensor and can hold none, which its class tells."""
    kind = value.__class__  # What TensorFlow has wrapped says what it stands for.
    if kind not in _HOLD_NOTHING:
        wraps = isinstance(value, types.FunctionType) or hasattr(value, "python_function")
        holds = wraps or is_container(value) or tf.is_tensor(value) or is_plain(value)
        _HOLD_NOTHING[kind] = isinstance(value, keras.Variable) or not holds
    return _HOLD_NOTHING[kind]


def children(value: Any) -> dict[str, Any] | None:
    """What is in a container, an object or the variables of a function, by name.

    Args:
        value: Anything.

    Returns:
        A dict, or `None` for what holds nothing.
    """
    if isinstance(value, Mapping):
        return {_text(key): item for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return {str(index): item for index, item in enumerate(value)}
    if tf.is_tensor(value):
        return None
    function = _function(value)
    if function is not None:
        return dict(_variables(function))
    if is_plain(value):
        return _attributes(value)
    return None


def changed(value: Any, news: Mapping[str, Any]) -> Any:
    """A container, an object or a function with other things in it, by name as in `children`.

    Args:
        value: What `children` knows, or `None` for a container that is to be made.
        news: What is to be in it, besides or instead.

    Returns:
        The same, or another where it cannot be changed in place.
    """
    if isinstance(value, Mapping):
        items = _by_key(value, news)
        if type(value) is dict or not isinstance(value, dict):
            value.update(items)  # type: ignore[attr-defined]
            return value
        # TensorFlow forbids to replace things in some that it has wrapped.
        return {**value, **items}
    function = _function(value)
    if function is not None:
        for name, item in news.items():
            _set_variable(function, name, item)
        return value
    if value is None or isinstance(value, (list, tuple, collections.deque)):
        return _changed_sequence(value or [], news)
    for name, item in news.items():
        if item is ABSENT:
            object.__delattr__(value, name)
        else:
            object.__setattr__(value, name, item)
    return value


def restored(value: Any, before: Mapping[str, Any]) -> Any:
    """A container, an object or a function with what was in it, and nothing else.

    Args:
        value: What `children` knows.
        before: What was in it. Of an object and a function, only what is to be restored.

    Returns:
        The same, or another where it cannot be changed in place.
    """
    if isinstance(value, tuple):
        return value
    if isinstance(value, Mapping):
        if isinstance(value, dict) and type(value) is not dict:
            return _by_key(value, before)
        for name in children(value) or {}:
            if name not in before:
                del value[_key(value, name)]  # type: ignore[attr-defined]
        return changed(value, before)
    if isinstance(value, (list, collections.deque)):
        if type(value) not in _IN_PLACE:
            return list(before.values())
        value.clear()
        value.extend(before.values())
        return value
    return changed(value, before)


def is_plain(value: Any) -> bool:
    """Whether a value is an object of a class of the user's own, or a bare namespace."""
    if isinstance(value, types.SimpleNamespace):
        return True
    kind = type(value)
    return not (_of_library(kind.__module__) or isinstance(value, _OTHERS) or tf.is_tensor(value))


def functions_of(kind: type) -> dict[str, types.FunctionType]:
    """The functions of a class and its bases that are not those of a library."""
    own = [base for base in kind.__mro__ if not _of_library(base.__module__)]
    held = {name: value for base in reversed(own) for name, value in vars(base).items()}
    found = {name: _function(value) for name, value in held.items()}
    return {name: function for name, function in found.items() if function is not None}


def whole_numbers(layer: keras.layers.Layer) -> dict[str, int]:
    """The attributes of a layer that its call may assign and that are Python integers."""
    names = {
        stored
        for name, function in functions_of(type(layer)).items()
        if name == "call" or not hasattr(keras.Model, name)
        for stored in _stored(function.__code__)
    }
    held = vars(layer)
    return {name: held[name] for name in sorted(names) if type(held.get(name)) is int}


def _of_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _attributes(value: Any) -> dict[str, Any]:
    slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _changed_sequence(value: Any, news: Mapping[str, Any]) -> Any:
    items = value if type(value) in _IN_PLACE else list(value)
    full = isinstance(items, collections.deque) and len(items) == items.maxlen
    for name, item in news.items():
        if int(name) < len(items) and not full:
            items[int(name)] = item
        else:
            items.append(item)
    if isinstance(value, tuple):
        # One with names takes its fields one by one, any other all of them.
        return type(value)(*items) if type(value) is not tuple else tuple(items)
    return items


def _text(key: Any) -> str:
    """A key as a part of a path; what it stands for can be found again."""
    if isinstance(key, str):
        return key.replace("/", "%2F")
    shown = isinstance(key, (int, float, bytes, tuple, enum.Enum, type(None)))
    text = f"({type(key).__name__} {key if shown else id(key)})".replace("/", "%2F")
    try:
        _FROM_TEXT_WHILE_ALIVE[text] = key
    except TypeError:
        _FROM_TEXT[text] = key
    return text


def _key(value: Mapping[Any, Any], text: str) -> Any:
    for key in value:
        if _text(key) == text:
            return key
    if not text.startswith("("):
        return text.replace("%2F", "/")
    return _FROM_TEXT_WHILE_ALIVE.get(text, _FROM_TEXT.get(text, ABSENT))


def _by_key(value: Mapping[Any, Any], items: Mapping[str, Any]) -> dict[Any, Any]:
    """Items by the keys themselves; without those that nothing refers to any more."""
    found = {_key(value, name): item for name, item in items.items()}
    return {key: item for key, item in found.items() if key is not ABSENT}


def _function(value: Any) -> types.FunctionType | None:
    """The user's function that a value is, also behind `tf.function`."""
    function = getattr(value, "python_function", value) if callable(value) else value
    known = isinstance(function, types.FunctionType)
    return function if known and not _of_library(function.__module__) else None


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function can keep things in: variables of functions around it, and of its module."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # It is not set yet.
            yield name, cell.cell_contents
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _set_variable(function: types.FunctionType, name: str, value: Any) -> None:
    if name in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
        if value is ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = value
    elif value is ABSENT:
        del function.__globals__[name]
    else:
        function.__globals__[name] = value


@functools.cache
def _stored(code: types.CodeType) -> tuple[str, ...]:
    stored = (one for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")
    return tuple({one.argval for one in stored})


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple({*code.co_names, *(name for one in inner for name in _names(one))})
