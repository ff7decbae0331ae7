"""The template's own steps, with every call of a model in them on all devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import keras

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.homes.plan import Homes
from parallel_keras.shard import is_empty
from parallel_keras.steps.penalties import at_home
from parallel_keras.towers.results import Call, Merged, as_call

if TYPE_CHECKING:
    from parallel_keras.steps.calls import Calls

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
    >>> from parallel_keras.steps import template_steps
    >>> class Custom(keras.Model):
    ...     def train_step(self, data):
    ...         return {}
    >>> template_steps.overrides(Custom(), ("train_step", "test_step"))
    ['train_step']
    """
    of_instance = [name for name, value in vars(model).items() if not isinstance(value, Redirected)]
    return [
        name
        for name in methods
        if getattr(type(model), name) is not getattr(base, name) or name in of_instance
    ]


def own_loops(template: keras.Model) -> list[str]:
    """The methods of Keras' loops that a template has made its own.

    Args:
        template: The model.

    Returns:
        A list of names.

    Example:
    >>> from parallel_keras.steps import template_steps
    >>> class Scaled(keras.Model):
    ...     def predict(self, x, **kwargs):
    ...         return super().predict(x / 255, **kwargs)
    >>> template_steps.own_loops(Scaled())
    ['predict']
    """
    return overrides(template, LOOPS)


class Redirected:
    """A method that stands in a template for one of the model that wraps it.

    While it runs, the template has its own again.

    Args:
        wrapper: The model whose method is meant.
        name: The name of the method.
        before: What the template itself had of that name, `None` for the method of its class.
    """

    def __init__(self, wrapper: keras.Model, name: str, before: Any) -> None:
        self._wrapper, self._name, self._before = wrapper, name, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method of the wrapper."""
        attributes = vars(self._wrapper.template)
        standing = {k: v for k, v in attributes.items() if isinstance(v, Redirected)}
        for name, redirected in standing.items():
            del attributes[name]
            if redirected._before is not None:
                attributes[name] = redirected._before
        try:
            return getattr(self._wrapper, self._name)(*args, **kwargs)
        finally:
            attributes.update(standing)


class TemplateSteps:
    """Runs steps that the template overrides, with its forward passes on towers.

    The step itself runs once, on the whole batch. Each call of the template, or
    of a model that is part of it, is cut among the devices and merged again, so
    that the losses in between see whole batches: GANs, variational autoencoders,
    distillation and contrastive models compute what they compute on one device.

    Args:
        template: The model whose steps are meant.
        make_calls: Function from a model to what runs its calls on towers.
        homes: Where the template's variables live.
    """

    def __init__(
        self,
        template: keras.Model,
        make_calls: Callable[[keras.Model], Calls],
        homes: Homes,
    ) -> None:
        self._homes = homes
        self._template = template
        self._make_calls = make_calls
        self._calls: dict[int, Calls] = {}

    def run(self, step: str, data: Any) -> Any:
        """Runs a step.

        Args:
            step: Name of the step.
            data: What Keras gives to it.

        Returns:
            What the step returns.
        """
        models = [x for x in _compat.all_layers(self._template) if isinstance(x, keras.Model)]
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(
                    calling(model, functools.partial(self._call, model, model.call))
                )
            weights = self._template.trainable_weights
            with self._homes.at_home(), at_home(weights, self._homes):
                return getattr(self._template, step)(data)

    def _call(
        self, model: keras.Model, whole: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What a model's `call` is during a step; `whole` is what it was."""
        on_a_tower = _compat.in_stateless_scope()
        # Keras adds the term of a model's own activity regulariser after its call, here as there.
        if on_a_tower or is_empty((args, kwargs)) or model.activity_regularizer is not None:
            return whole(*args, **kwargs)
        training = kwargs.pop("training", _compat.training_of_call(model))
        mask = kwargs.pop("mask", None)
        if id(model) not in self._calls:
            self._calls[id(model)] = self._make_calls(model)

        def flow(towers: Any, call: Call, training: Any) -> Merged:
            shards = towers.shard(call)
            results = towers.run(shards, training)
            return towers.merge(results)

        call = as_call(args, kwargs, mask)
        merged = self._calls[id(model)].differentiable(flow, call, training)
        layers = _compat.all_layers(model) if merged.terms else []
        for number, terms in merged.terms.items():
            layers[int(number)].add_loss(terms)
        return merged.attached()
