"""One call of a model, as towers take it."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import knows_more


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


def as_positional(
    template: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives by position what the template's `call` names, but for Keras' own arguments.

    `DataParallelModel.call` cannot know those names, and Keras refuses tensors and
    other values side by side in the rest of the keywords.

    Args:
        template: The model to call.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Positional and keyword arguments.
    """
    context: dict[str, Any] = {
        name: kwargs[name] for name in ("training", "mask") if name in kwargs
    }
    # By position Keras takes only what it knows to be a nest of tensors.
    context |= {name: value for name, value in kwargs.items() if knows_more(value)}
    named = {name: value for name, value in kwargs.items() if name not in context}
    if not named:
        return args, kwargs
    bound = inspect.signature(template.call).bind_partial(*args, **named)
    return bound.args, {**bound.kwargs, **context}


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
