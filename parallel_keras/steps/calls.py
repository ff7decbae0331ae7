"""Each call of a model on its towers, differentiated as the moment asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.steps.any_call import DifferentiablePass
from parallel_keras.steps.direct_calls import DirectCalls
from parallel_keras.steps.loss_on_merged import Recording
from parallel_keras.towers.results import Call, Merged

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
        self._recording: Recording | None = None
        self._direct = DirectCalls(towers, self._to_any_order)

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
        if self._recording is not None and self._recording.is_free:
            return flow(self._recording, call, training)
        if tf.executing_eagerly() and not self._eager and not _compat.in_stateless_scope():
            return self._direct(flow, call, training)
        return self._to_any_order(self.towers(), flow, call, training)

    @contextlib.contextmanager
    def record(self, tape: tf.GradientTape | None) -> Iterator[Recording]:
        """The first call inside is the step's forward pass, see `Recording`."""
        outer, self._recording = self._recording, Recording(self.towers(), tape)
        try:
            yield self._recording
        finally:
            self._recording = outer

    def _to_any_order(self, towers: Towers, flow: Flow, call: Call, training: Any) -> Merged:
        """A call that any tape can differentiate, to any order."""

        def pure(towers: DifferentiablePass, given: Call) -> Merged:
            return flow(towers, given, training)

        return DifferentiablePass(towers).differentiate(pure, call)
