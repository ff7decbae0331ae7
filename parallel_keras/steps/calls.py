"""Each call of a model on its towers, differentiated as the moment asks for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import floats
from parallel_keras.steps.any_call import DifferentiablePass, without_gradient
from parallel_keras.steps.direct_calls import DirectCalls
from parallel_keras.steps.loss_on_merged import Recording
from parallel_keras.towers.call import Call
from parallel_keras.towers.results import Merged
from parallel_keras.towers.weights import read

if TYPE_CHECKING:
    from parallel_keras.towers.run import Towers

# From a pass (which can `shard`, `run` and `merge`), a call and `training` to what is merged.
Flow = Callable[[Any, Call, Any], Merged]


class Calls:
    """Runs calls of one model.

    Args:
        towers: Function that gives the `Towers` of the model as it is now.
        eager: Whether nothing is traced.
    """

    def __init__(self, towers: Callable[[], Towers], *, eager: bool = False) -> None:
        self.towers = towers
        self._eager = eager
        self._flows: dict[CodeType, Flow] = {}
        # One for each thread: one may predict while another trains.
        self._recordings: dict[int, Recording] = {}
        self._direct = DirectCalls(towers, self._to_order)

    def differentiable(self, flow: Flow, call: Call, training: Any) -> Merged:
        """Runs a call so that gradients find their way back to the devices of the towers.

        Args:
            flow: What a call does, made of a pass' `shard`, `run` and `merge`.
            call: The `Call`.
            training: Bool or `None`, the argument of that name.

        Returns:
            The `Merged`. What layers assigned is assigned.
        """
        # What is defined inside of a `call` is a new function each time, and would be traced anew.
        flow = self._flows.setdefault(flow.__code__, flow)
        recording = self._recordings.get(threading.get_ident())
        if recording is not None and recording.is_free:
            return flow(recording, call, training)
        if not tf.executing_eagerly() or _compat.in_stateless_scope():
            return self._in_graph(flow, call, training)
        order = self._order(call)
        if self._eager:
            return self._to_order(self.towers(), flow, call, training, order)
        return self._direct(flow, call, training, order)

    @contextlib.contextmanager
    def record(
        self, tape: tf.GradientTape | None, *, in_parts: bool = False
    ) -> Iterator[Recording]:
        """The first call inside is the step's forward pass, see `Recording`."""
        thread = threading.get_ident()
        outer = self._recordings.get(thread)
        recording = self._recordings[thread] = Recording(self.towers(), tape, in_parts=in_parts)
        try:
            yield recording
        finally:
            if outer is None:
                del self._recordings[thread]
            else:
                self._recordings[thread] = outer

    def _order(self, call: Call) -> int:
        """How often what a call gives may be differentiated; outside of graphs that is known."""
        if not _compat.may_be_recorded():  # Reading all weights to ask of each takes time.
            return 0
        towers = self.towers()
        variables = towers.template.variables
        weights = [
            read(variables[index], towers.homes.of(variables[index])) for index in towers.trainable
        ]
        return _compat.gradient_order([*weights, *floats(call)])

    def _in_graph(self, flow: Flow, call: Call, training: Any) -> Merged:
        """A call in a graph, which may be differentiated later by who calls the graph."""
        try:
            return self._to_order(self.towers(), flow, call, training, None)
        except Exception as error:
            if self._order(call):
                raise
            # Something in it has no gradient, or it is wrong in itself: then this fails, too.
            merged = self._to_order(self.towers(), flow, call, training, 0)
            return without_gradient(merged, error)

    def _to_order(
        self, towers: Towers, flow: Flow, call: Call, training: Any, order: int | None
    ) -> Merged:
        """A call that can be differentiated so often: 0, 1 or 2 for any; `None` to find out."""
        if order == 0:
            return flow(Recording(towers, None), call, training)

        def pure(towers: DifferentiablePass, given: Call) -> Merged:
            return flow(towers, given, training)

        once = None if order is None else order == 1
        return DifferentiablePass(towers, once=once).differentiate(pure, call)
