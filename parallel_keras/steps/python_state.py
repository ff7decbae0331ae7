"""What Python says about a model now: whether a trace of it still holds."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import of_any_rows
from parallel_keras.steps.user_code import (
    PASSED_OVER,
    held_by_class,
    is_of_packages,
    read_by_function,
)

if TYPE_CHECKING:
    from parallel_keras.towers.call import Call

# Arrays that are larger are not compared.
_LARGEST_ARRAY = 2**16
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, tf.DType)
# Nothing changes in these, or it is known otherwise.
_BY_IDENTITY = (
    keras.Variable,
    keras.KerasTensor,
    tf.Tensor,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.CodeType,
    inspect.Signature,
)
# How TensorFlow finds the same objects once more.
_OF_CHECKPOINTS = "_self_"
# Numbers that TensorFlow counts up for whatever is traced.
_COUNTED = re.compile(rb"(CustomGradient|PartitionedCall)-\d+")


class Attributes(NamedTuple):
    """The attributes of a model and of all that it is made of.

    Attributes:
        values: What is compared.
        held: What was compared by identity, so that nothing else gets the same one.
    """

    values: list[Any]
    held: list[Any]


def attributes(model: keras.Model) -> Attributes | None:
    """Everything that the code of a model reads besides variables and inputs.

    Args:
        model: The model.

    Returns:
        The `Attributes`; `None` if there is code in it that may read anything, or do more than
        compute.
    """
    config = (keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format())
    found = Attributes([config], [])
    seen: set[int] = set()
    layers = _compat.all_layers(model)
    return found if all(_collect(layer, found, seen) for layer in layers) else None


def _collect(root: Any, found: Attributes, seen: set[int]) -> bool:
    """Adds an object and all that it holds; `False` if it cannot be known what one of them does."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        # Containers that TensorFlow tracks stand for a dict or list, and say so.
        children = _CHILDREN[_kind(value.__class__)]
        if children is None:
            found.values.append((type(value), value))
            continue
        found.values.append(id(value))
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.held.append(value)
        held = children(value, found.values)
        if held is None:
            return False
        waiting.extend(held)
    return True


# Asked for each attribute at each call, and what numpy and TensorFlow answer takes time.
@functools.lru_cache(maxsize=4096)
def _kind(of: type) -> str:
    """How a value of a type is compared: the name of one of `_CHILDREN`."""
    kinds: dict[str, Any] = {
        "plain": _PLAIN,
        "function": types.FunctionType,
        "array": np.ndarray,
        "dict": dict,
        "items": (list, tuple, set, frozenset),
        "itself": _BY_IDENTITY,
        "member": (property, staticmethod, classmethod),
        "class": type,
    }
    for name, types_ in kinds.items():
        if issubclass(of, types_):
            return name
    if _is_of_keras(of):
        return "object"
    return "unknown" if of.__module__.startswith(("numpy", "tensorflow")) else "user"


def _of_function(value: Any, _: list[Any]) -> list[Any] | None:
    if _is_of_keras(value):
        return None if value.__closure__ else []
    # TensorFlow puts functions around its own, which look at types only.
    return [] if str(value.__module__).startswith("tensorflow.") else read_by_function(value)


def _of_member(value: Any, _: list[Any]) -> list[Any] | None:
    return [value.fget, value.fset] if isinstance(value, property) else [value.__func__]


def _of_class(value: type, _: list[Any]) -> list[Any] | None:
    # Whoever makes an object of a class of the user's may do anything.
    return [] if value.__module__ == "builtins" or is_of_packages(value) else None


def _of_user(value: Any, values: list[Any]) -> list[Any] | None:
    """An object of a class of the user's: what it holds, and what its code reads."""
    attributes = _of_object(value, values)
    return None if attributes is None else [*attributes, *held_by_class(type(value))]


def _of_array(value: Any, values: list[Any]) -> list[Any] | None:
    small = value.nbytes <= _LARGEST_ARRAY
    values.append(value.tobytes() if small else None)
    return [] if small and value.dtype != object else None


def _of_dict(value: Any, values: list[Any]) -> list[Any] | None:
    values.extend(map(str, value))
    return list(value.values())


def _of_items(value: Any, values: list[Any]) -> list[Any] | None:
    values.append(len(value))
    return list(value)


def _of_object(value: Any, values: list[Any]) -> list[Any] | None:
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return None
    names = [
        name
        for name in attributes
        if name not in PASSED_OVER and not name.startswith(_OF_CHECKPOINTS)
    ]
    values.extend(names)
    return [attributes[name] for name in names]


# For each kind a function from a value, and what is compared, to what the value holds, which is
# `None` if it cannot be known what it does. What is plain is compared as it is.
_CHILDREN: dict[str, Callable[[Any, list[Any]], list[Any] | None] | None] = {
    "plain": None,
    "function": _of_function,
    "array": _of_array,
    "dict": _of_dict,
    "items": _of_items,
    "itself": lambda *_: [],
    "object": _of_object,
    "member": _of_member,
    "class": _of_class,
    "user": _of_user,
    "unknown": lambda *_: None,
}


def _is_of_keras(thing: Any) -> bool:
    return str(thing.__module__).split(".")[0] == "keras"


class Graph(NamedTuple):
    """What a call of a model came to when it was traced.

    Attributes:
        digest: Of the operations and of what is returned.
        captured: The tensors from outside that it uses.
    """

    digest: bytes
    captured: list[tf.Tensor]

    def same(self, other: Graph) -> bool:
        """Whether another trace of the same call computes the same."""
        pairs = zip(self.captured, other.captured, strict=False)
        return self.digest == other.digest and all(one is two for one, two in pairs)


def graph(tower: Any, call: Any, number: tf.TensorSpec | None, training: Any) -> Graph:
    """Traces a tower once, to see what Python says now.

    Args:
        tower: The `Tower`.
        call: The specs of a `Call`.
        number: The spec of the number of the tower.
        training: Bool or `None`, the argument of that name.

    Returns:
        The `Graph`.
    """
    weights = [tf.TensorSpec(v.shape, v.dtype) for v in tower.template.variables]
    function = tf.function(tower.call, autograph=False)
    traced = function.get_concrete_function(weights, number, None, call, training)
    text = _without_names(traced.graph.as_graph_def())
    returned = tf.nest.map_structure(lambda _: None, traced.structured_outputs)
    captured = [outside for outside, _ in traced.graph.captures]
    text += repr((returned, len(captured))).encode()
    return Graph(hashlib.blake2b(text).digest(), captured)


def _without_names(definition: tf.compat.v1.GraphDef) -> bytes:
    """What a graph says, functions by the order in which they are used: their names are new."""
    parts = {part.signature.name: part for part in definition.library.function}
    if not parts:
        return _COUNTED.sub(rb"\1", definition.SerializeToString(deterministic=True))
    # As text: in bytes, the length of a name counts in all that it is part of.
    texts = ["".join(map(str, definition.node))]
    order: list[str] = []
    for text in texts:
        used = sorted((text.find(name), name) for name in parts if name in text)
        new = [name for _, name in used if name not in order]
        order += new
        texts += [str(parts[name]) for name in new]
    content = _COUNTED.sub(rb"\1", "".join(texts).encode())
    # A name may begin as another one does.
    for name in sorted(order, key=len, reverse=True):
        content = content.replace(name.encode(), b"function %d" % order.index(name))
    return content


def specs(call: Call) -> Any:
    """The specs of a call, for any number of rows."""

    def spec(leaf: Any) -> Any:
        if not tf.is_tensor(leaf):
            return leaf
        if isinstance(leaf, tf.Tensor):
            return tf.TensorSpec([None, *leaf.shape[1:]] if leaf.shape.rank else [], leaf.dtype)
        relaxed = of_any_rows(leaf)
        return relaxed if isinstance(relaxed, tf.TypeSpec) else tf.type_spec_from_value(leaf)

    return tf.nest.map_structure(spec, call)


def kind(call: Call) -> str:
    """What calls have in common that one trace can serve: all but the sizes."""

    def sign(leaf: Any) -> str:
        if tf.is_tensor(leaf):
            return f"{type(leaf).__name__} of {leaf.dtype.name}, rank {leaf.shape.rank}"
        return repr(leaf)

    return repr(tf.nest.map_structure(sign, call))
