"""Which slices of a tower's sparse gradient are its own, and which every tower has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from parallel_keras.graphs.origin import Spot, depends_on_rows, inside, source_of
from parallel_keras.slices import ROWS, SAME, UNIQUE, joined

# For each piece of a gradient what it is, and how many slices it has, `None` if nobody knows.
Plan = list[tuple[str, Any]]


class Sorting:
    """Takes sparse gradients of towers apart by kind, see `slices`.

    The graph tells where the indices of a gradient come from. Without a graph the same code is
    traced once for each kind of batch, only to look at it.
    """

    def __init__(self) -> None:
        self._traces: dict[str, Any] = {}
        self._plans: dict[int, list[Plan]] = {}
        self._last: list[Plan] = []

    def sort(
        self,
        gradients: Sequence[Any],
        varies: Iterable[Any],
        name: str,
        again: Callable[..., Any],
        given: tuple[Any, ...],
    ) -> list[Any]:
        """Takes the gradients of a tower apart.

        Args:
            gradients: For each weight a tensor, `tf.IndexedSlices` or `None`.
            varies: What differs between towers, tensors.
            name: Which gradients they are, to tell traces apart.
            again: Function that computes the gradients anew, and calls `sort`.
            given: Its arguments.

        Returns:
            A list like the one given, with dicts of slices by kind where not all slices are
            the tower's own.
        """
        sparse = [i for i, gradient in enumerate(gradients) if _has_slices(gradient)]
        if not sparse:
            return list(gradients)
        if tf.executing_eagerly():
            plans = self._look_at_trace(name, again, given)
        else:
            sources = [leaf for leaf in varies if isinstance(leaf, tf.Tensor)]
            plans = self._last = [_plan(gradients[i].indices, sources) for i in sparse]
        result = list(gradients)
        for index, plan in zip(sparse, plans, strict=True):
            result[index] = apart(gradients[index], plan)
        return result

    def _look_at_trace(
        self, name: str, again: Callable[..., Any], given: tuple[Any, ...]
    ) -> list[Plan]:
        if name not in self._traces:
            self._traces[name] = tf.function(again, autograph=False)
        trace = self._traces[name].get_concrete_function(*given)
        return self._plans.setdefault(id(trace), self._last)


def _has_slices(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def _plan(indices: tf.Tensor, sources: Sequence[tf.Tensor]) -> Plan:
    """The pieces of a gradient, in order; neighbours of one kind are one piece."""
    plan: Plan = []
    for spot in _pieces(Spot(indices)):
        kind, size = _kind(spot, sources), _size(spot)
        if plan and plan[-1][0] == kind:
            before = plan.pop()[1]
            size = None if size is None or before is None else before + size
        plan.append((kind, size))
    return plan


def _pieces(spot: Spot) -> list[Spot]:
    """The pieces that a vector was put together from."""
    origin = source_of(spot)
    if origin.op.type != "ConcatV2" or origin.tensor.shape.rank != 1:
        return [origin]
    return [piece for part in inside(origin)[:-1] for piece in _pieces(part)]


def _kind(spot: Spot, sources: Sequence[tf.Tensor]) -> str:
    if not depends_on_rows(spot, sources):
        return SAME
    return UNIQUE if spot.op.type in ("Unique", "UniqueV2") and spot.number == 0 else ROWS


def _size(spot: Spot) -> Any:
    known = spot.tensor.shape.num_elements()
    # A tensor inside of a function that was called cannot be asked from outside.
    return tf.size(spot.tensor) if known is None and not spot.calls else known


def apart(gradient: tf.IndexedSlices, plan: Plan) -> Any:
    """The slices of a gradient by kind; the gradient itself where all are the tower's own."""
    kinds = [kind for kind, _ in plan]
    if len(plan) == 1:
        return gradient if kinds == [ROWS] else {kinds[0]: gradient}
    sizes = [size for _, size in plan]
    unknown = [index for index, size in enumerate(sizes) if size is None]
    if len(unknown) > 1:
        raise ValueError(
            "Expected to know how many rows of a weight are looked up by positions that are the "
            "same for every row of the batch, and how many by the data, where both are done with "
            f"one weight. Received: kinds={kinds}, sizes={sizes}. Give the inputs a fixed length: "
            "keras.Input((length,))."
        )
    if unknown:
        others = sum((size for size in sizes if size is not None), start=0)
        sizes[unknown[0]] = tf.size(gradient.indices) - others
    values, indices = (tf.split(leaf, sizes) for leaf in (gradient.values, gradient.indices))
    found: dict[str, list[tf.IndexedSlices]] = {}
    for kind, value, index in zip(kinds, values, indices, strict=True):
        found.setdefault(kind, []).append(tf.IndexedSlices(value, index, gradient.dense_shape))
    return {kind: joined(parts) for kind, parts in found.items()}
