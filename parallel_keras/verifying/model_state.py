"""Everything of a model that a step changes: read, put back, and the gradients on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat

# What the names of the variables of metrics begin with.
METRIC: Final = "metric "


class ModelState:
    """The variables of a model, of its optimizers and metrics, and raw ones on its layers.

    Args:
        models: The wrapper and its template.
    """

    def __init__(self, *models: keras.Model) -> None:
        self._models = models
        template = models[-1]
        self._layers = _compat.all_layers(template)
        self.optimizers = _optimizers(models)
        self._gradients: dict[str, tf.Variable] = {}
        self._start: dict[str, Any] = {}
        self.remember()

    def variables(self) -> dict[str, Any]:
        """Keras' and raw variables by a name that tells them apart."""
        named: dict[str, Any] = {}
        seen: set[int] = set()

        def add(name: str, variable: Any) -> None:
            if id(variable) not in seen:
                seen.add(id(variable))
                while name in named:
                    name += "'"
                named[name] = variable

        template = self._models[-1]
        for variable in template.variables:
            add(variable.path, variable)
        for layer in self._layers:
            for attribute, variable in _raw_variables(layer):
                add(f"{layer.name}.{attribute} (tf.Variable)", variable)
        for optimizer in self.optimizers:
            for variable in optimizer.variables:
                add(f"optimizer {variable.path}", variable)
        for model in self._models:
            for variable in model.metrics_variables:
                add(METRIC + variable.path, variable)
        return named

    def read(self) -> dict[str, np.ndarray]:
        """The values of all variables, on the host."""
        return {name: np.array(_numpy(variable)) for name, variable in self.variables().items()}

    def remember(self) -> None:
        """Takes the values of variables that are new as those to put back."""
        for name, variable in self.variables().items():
            self._start.setdefault(name, (variable, np.array(_numpy(variable))))

    def start(self) -> dict[str, np.ndarray]:
        """The values that `restore` puts back."""
        return {name: value for name, (_, value) in self._start.items()}

    def kept(self) -> set[str]:
        """The names of what layers assign themselves: weights that no optimizer updates."""
        kept = {id(variable) for variable in self._models[-1].non_trainable_variables}
        return {name for name, variable in self.variables().items() if id(variable) in kept}

    def restore(self) -> None:
        """Puts every variable back to what it was when it was first seen."""
        for variable, value in self._start.values():
            variable.assign(value)
        for gradient in self._gradients.values():
            gradient.assign(tf.zeros_like(gradient))

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        """Inside, the state to start from has weights that are off by one rounding.

        Args:
            seed: Int, says which are too large and which too small.
        """
        start, random = dict(self._start), np.random.default_rng(seed)
        for name, (variable, value) in start.items():
            if value.dtype.kind == "f" and getattr(variable, "trainable", False):
                off = np.finfo(value.dtype).eps * random.choice([-1, 1], value.shape)
                self._start[name] = variable, (value * (1 + off)).astype(value.dtype)
        try:
            yield
        finally:
            self._start = start

    def gradients(self) -> dict[str, np.ndarray]:
        """The sums of the gradients that optimizers got since `restore`."""
        return {name: value.numpy() for name, value in self._gradients.items()}

    @contextlib.contextmanager
    def noting_gradients(self) -> Iterator[None]:
        """Inside, what optimizers are given is noted, also by steps of the model's own."""
        for optimizer in self.optimizers:
            optimizer.apply = self._noting(optimizer, optimizer.apply)
        try:
            yield
        finally:
            for optimizer in self.optimizers:
                del optimizer.apply

    def _noting(self, optimizer: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
        def noted(grads: Any, trainable_variables: Any = None) -> Any:
            grads = list(grads)
            variables = list(trainable_variables or _compat.optimized(optimizer))
            with tf.init_scope():
                if not optimizer.built:
                    with keras.name_scope(optimizer.name):
                        optimizer.build(variables)
                self.remember()
            for variable, gradient in zip(variables, grads, strict=True):
                if gradient is not None:
                    noted = self._note_of(variable)
                    noted.assign_add(tf.cast(tf.convert_to_tensor(gradient), noted.dtype))
            return apply(grads, variables)

        return noted

    def _note_of(self, variable: Any) -> tf.Variable:
        name = getattr(variable, "path", variable.name)
        if name not in self._gradients:
            with tf.init_scope(), tf.device("/CPU:0"):
                shape, dtype = (
                    tuple(variable.shape),
                    keras.backend.standardize_dtype(variable.dtype),
                )
                self._gradients[name] = tf.Variable(tf.zeros(shape, dtype), trainable=False)
        return self._gradients[name]


def _optimizers(models: tuple[keras.Model, ...]) -> list[Any]:
    found: dict[int, Any] = {}
    for model in models:
        for value in [getattr(model, "optimizer", None), *vars(model).values()]:
            if isinstance(value, keras.optimizers.Optimizer):
                found[id(value)] = value
    return list(found.values())


def _raw_variables(layer: Any) -> list[tuple[str, tf.Variable]]:
    held = [
        (attribute, leaf)
        for attribute, value in vars(layer).items()
        if not attribute.startswith("_")
        for leaf in (tf.nest.flatten(value) if isinstance(value, (list, dict)) else [value])
    ]
    return [(attribute, leaf) for attribute, leaf in held if isinstance(leaf, tf.Variable)]


def _numpy(variable: Any) -> Any:
    return variable.numpy() if isinstance(variable, tf.Variable) else variable.value.numpy()
