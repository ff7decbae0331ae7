"""The template's own steps, with every call of a model in them on all devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.homes.plan import Homes
from parallel_keras.shard import is_empty
from parallel_keras.steps.building import build_eagerly
from parallel_keras.steps.penalties import at_home
from parallel_keras.towers.call import Call, as_call
from parallel_keras.towers.results import Merged

if TYPE_CHECKING:
    from parallel_keras.steps.calls import Calls


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
                return _compat.as_called_by_user(getattr(self._template, step))(data)

    def _call(
        self, model: keras.Model, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """What a model's `call` is during a step; `original` is what it was."""
        on_a_tower = _compat.in_stateless_scope()
        # Keras adds the term of a model's own activity regulariser after its call, here as there.
        if on_a_tower or is_empty((args, kwargs)) or model.activity_regularizer is not None:
            return original(*args, **kwargs)
        if id(model) not in self._calls:
            build_eagerly(model, original, args, kwargs)
            self._calls[id(model)] = self._make_calls(model)
        training = kwargs.pop("training", _compat.training_of_call(model))
        mask = kwargs.pop("mask", None)

        def flow(towers: Any, call: Call, training: Any) -> Merged:
            shards = towers.shard(call)
            results = towers.run(shards, training)
            return towers.merge(results)

        call = as_call(args, kwargs, mask)
        merged = self._calls[id(model)].differentiable(flow, call, training)
        layers = _compat.all_layers(model) if merged.terms else []
        for number, terms in merged.terms.items():
            layers[int(number)].add_loss(terms)
        return merged.attached(model)
