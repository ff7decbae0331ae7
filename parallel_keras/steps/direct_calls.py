"""Calls of a model outside of any graph: what Python says now, on all towers at the same time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from absl import logging

from parallel_keras.steps import python_state

if TYPE_CHECKING:
    from parallel_keras.towers.call import Call
    from parallel_keras.towers.results import Merged
    from parallel_keras.towers.run import Towers


@dataclasses.dataclass
class _Traced:
    """A function that was traced, and what Python said then.

    Attributes:
        function: The `tf.function`.
        call: The specs of the call that it is judged by.
        graph: What the model came to for such a call.
        attributes: What there was to read, `None` if that is not known.
    """

    function: Callable[..., Merged]
    call: Any
    graph: python_state.Graph
    attributes: python_state.Attributes | None


class DirectCalls:
    """Runs calls as a graph, which outside of one would run tower after tower.

    On one device Python runs at each such call: an attribute that was set, or a layer that
    was adapted since the last one, counts. So a trace is used again only where the model's
    attributes are the same, and so is all else that its code reads, or else, where that cannot be
    known, where the model, traced once more, comes to the same graph. The first costs about what
    Python costs on one device, the second ten times that.

    Args:
        towers: Function that gives the `Towers` of the model as it is now.
        run: Function from the `Towers` and what `__call__` takes to what it gives.
    """

    def __init__(self, towers: Callable[[], Towers], run: Callable[..., Merged]) -> None:
        self._towers, self._run = towers, run
        self._traced: dict[Any, _Traced] = {}
        self._made_for: Any = None
        self._untraceable = False

    def __call__(self, flow: Any, call: Call, training: Any, order: int) -> Merged:
        """Runs a call.

        Args:
            flow: What a call does, see `Calls`.
            call: The `Call`.
            training: Bool or `None`, the argument of that name.
            order: Int, how often it may be differentiated.

        Returns:
            The `Merged`.
        """
        towers = self._towers()
        if self._untraceable:
            return self._run(towers.untraced(), flow, call, training, order)
        try:
            return self._function(towers, flow, call, training, order)(call)
        except tf.errors.OpError:
            raise
        except Exception as error:
            if towers.talk:
                raise
            # What cannot be traced runs on one device too, where nothing is traced.
            merged = self._run(towers.untraced(), flow, call, training, order)
            self._untraceable = True
            logging.warning(
                "%s cannot be traced, so it runs on one tower after the other when it is called "
                "outside of a step: %s",
                *(towers.template.name, str(error).strip().partition("\n")[0]),
            )
            return merged

    def _function(
        self, towers: Towers, flow: Any, call: Call, training: Any, order: int
    ) -> Callable[..., Merged]:
        """A function that was traced when Python said what it says now, or one to be traced."""
        if self._made_for is not towers:
            self._made_for = towers
            self._traced.clear()
        kind = python_state.kind(call), flow, training, order
        attributes = python_state.attributes(towers.template)
        known = self._traced.get(kind)
        if known is not None and attributes is not None and attributes == known.attributes:
            return known.function
        like = python_state.specs(call) if known is None else known.call
        number = None if towers.alone else tf.TensorSpec((), tf.int32)
        graph = python_state.graph(towers.tower, like, number, training)
        if known is not None and known.graph.same(graph):
            known.attributes = attributes
            return known.function

        # What the kind tells is not given as arguments: TensorFlow would compare it at each call.
        def run(call: Call) -> Merged:
            return self._run(self._towers(), flow, call, training, order)

        function = tf.function(run, autograph=False, reduce_retracing=True)
        self._traced[kind] = _Traced(function, like, graph, attributes)
        return function
