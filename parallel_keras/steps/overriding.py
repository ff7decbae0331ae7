"""Which methods of Keras a template has made its own, and how others stand in for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import keras

# Overriding one of them changes what Keras' loops do besides their steps.
LOOPS: Final = (
    *("fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
    *("make_train_function", "make_test_function", "make_predict_function"),
    *("reset_metrics", "get_metrics_result"),
)
# Overriding one of them changes what `fit` and `evaluate` compute.
LEARNING = ("train_step", "test_step", "compute_loss", "compute_metrics", "metrics")


def overrides(model: keras.Model, methods: tuple[str, ...], base: type = keras.Model) -> list[str]:
    """The methods of a base class that a model's class has made its own.

    Args:
        model: The model.
        methods: Names of methods and properties.
        base: Class. Defaults to `keras.Model`.

    Returns:
        A list of names.

    Example:
    >>> from parallel_keras.steps import overriding
    >>> class Custom(keras.Model):
    ...     def train_step(self, data):
    ...         return {}
    >>> overriding.overrides(Custom(), ("train_step", "test_step"))
    ['train_step']
    """
    of_instance = [name for name, value in vars(model).items() if not isinstance(value, Redirected)]
    return [
        name
        for name in methods
        if getattr(type(model), name) is not getattr(base, name) or name in of_instance
    ]


def overridden_loops(template: keras.Model) -> list[str]:
    """The methods of Keras' loops that a template has made its own.

    Args:
        template: The model.

    Returns:
        A list of names.

    Example:
    >>> from parallel_keras.steps import overriding
    >>> class Scaled(keras.Model):
    ...     def predict(self, x, **kwargs):
    ...         return super().predict(x / 255, **kwargs)
    >>> overriding.overridden_loops(Scaled())
    ['predict']
    """
    return overrides(template, LOOPS)


def overridden_steps(template: keras.Model) -> list[str]:
    """The methods of Keras' steps that a template has made its own.

    Args:
        template: The model.

    Returns:
        A list of names.
    """
    return overrides(template, LEARNING)


def call_loss(compute_loss: Any, given: Mapping[str, Any], *, training: bool) -> Any:
    """Calls `compute_loss` of a model, also one that was written before Keras 3.3.

    Args:
        compute_loss: The method.
        given: Inputs, targets, outputs and weights of rows, by the names of its arguments.
        training: Whether it is for training, which older ones are not told.

    Returns:
        What it returns.
    """
    takes_training = "training" in inspect.signature(compute_loss).parameters
    return compute_loss(**given, **({"training": training} if takes_training else {}))


class Redirected:
    """A method that stands in a template for one of the model that wraps it.

    While it runs, the template has its own again.

    Args:
        wrapper: The model whose method is meant.
        name: The name of the method.
        before: What the template itself had of that name, `None` for the method of its class.
    """

    def __init__(self, wrapper: keras.Model, name: str, before: Any) -> None:
        self._wrapper, self._name, self.before = wrapper, name, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method of the wrapper."""
        attributes = vars(self._wrapper.template)
        standing = {k: v for k, v in attributes.items() if isinstance(v, Redirected)}
        for name, redirected in standing.items():
            del attributes[name]
            if redirected.before is not None:
                attributes[name] = redirected.before
        try:
            return getattr(self._wrapper, self._name)(*args, **kwargs)
        finally:
            attributes.update(standing)
