"""The towers of a template as it is now."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat

if TYPE_CHECKING:
    from parallel_keras.towers.run import Towers


def current(make: Callable[[], Towers]) -> Callable[[], Towers]:
    """The towers of a template as it is now, whenever asked.

    Weights come and go (LoRA, quantisation) and layers are frozen, without any call that
    would tell who traced the template. And each graph is traced anew by what Python says
    when it is made, as on one device, where nothing that was traced before is in it.

    Args:
        make: Makes the towers.

    Returns:
        A function that gives the last ones made, or new ones where the template changed or
        another graph is being made.
    """
    made: dict[bool, tuple[Towers, Any, Any]] = {}

    def now() -> Towers:
        eager = tf.executing_eagerly()
        graph = None if eager else tf.compat.v1.get_default_graph()
        towers, known, where = made.get(eager, (None, None, None))
        here = eager or (where is not None and where() is graph)
        if towers is None or not here or known != _fingerprint(towers.template):
            towers = make()
            # Held by the graph itself, it would keep that from ever being freed.
            where = None if graph is None else weakref.ref(graph)
            made[eager] = towers, _fingerprint(towers.template), where
        return towers

    return now


def _fingerprint(template: keras.Model) -> tuple[Any, ...]:
    """What a trace of a model depends on besides its arguments."""
    layers = _compat.all_layers(template)
    return (*map(id, template.variables), *(layer.trainable for layer in layers))
