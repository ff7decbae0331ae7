"""One call of a model, as towers take it."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

import keras
import tensorflow as tf

from parallel_keras import _compat


class Call(TypedDict):
    """One call of a model: a nest that is cut by rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    masks: Any  # of the args, a nest like them


def as_call(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> Call:
    """One call of a model, as towers take it.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments, without `training` and `mask`.
        mask: Masks of the first argument, `None` for those that Keras attached.

    Returns:
        The `Call`.
    """
    masks = keras.tree.map_structure(_compat.get_mask, args)
    if mask is not None:
        masks = (mask, *masks[1:])
    return {"args": args, "kwargs": kwargs, "masks": masks}


def by_name(
    model: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by name from the first one on that Keras takes only so: no tensor.

    Args:
        model: The model to call.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Positional and keyword arguments.
    """
    leaves = [keras.tree.flatten(argument) for argument in args]
    plain = [any(not (leaf is None or tf.is_tensor(leaf)) for leaf in found) for found in leaves]
    first = plain.index(True) if any(plain[1:]) else len(args)
    if not first or first == len(args):
        return args, kwargs
    names = list(inspect.signature(type(model).call).parameters)[1:]
    return args[:first], {**dict(zip(names[first:], args[first:], strict=False)), **kwargs}


def takes_training(model: keras.Model) -> bool:
    """Whether a model's `call` has an argument `training`: only then Keras' steps give it one.

    Args:
        model: The model.

    Returns:
        Bool.
    """
    return "training" in inspect.signature(type(model).call).parameters


def given(training: Any) -> dict[str, Any]:
    """The argument `training` of a call, if there is one: `None` would hide the default of `call`.

    Args:
        training: Bool or `None`.

    Returns:
        Keyword arguments.
    """
    return {} if training is None else {"training": training}
