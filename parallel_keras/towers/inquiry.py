"""What is asked of a call on the towers besides what they return: what follows the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.outputs import Given
from parallel_keras.graphs.sparse import Sorting
from parallel_keras.nests import flatten, flatten_with_paths, mapped, symbol
from parallel_keras.towers import left_behind

if TYPE_CHECKING:
    from parallel_keras.towers.call import Call
    from parallel_keras.towers.function import Body
    from parallel_keras.towers.results import Sort
    from parallel_keras.towers.tower import Tower

Watch = Callable[[list[tf.Tensor], Any], list[tf.Tensor]]


class Inquiry:
    """Finds out which outputs have rows, and which slices of gradients are a tower's own.

    Args:
        tower: The `Tower`.
        rules: What to do with single inputs and outputs, by name.
        alone: Whether there is one tower only: then nothing needs to be found out.
    """

    def __init__(self, tower: Tower, rules: Mapping[str, str], *, alone: bool) -> None:
        self._tower = tower
        self._rules = rules
        self._alone = alone
        self._sorting = Sorting()
        self._known_sizes: dict[str, Any] = {}

    def given_to(self, part: Any, counts: Sequence[Any] = ()) -> Given:
        """What is known of a call of the template, seen from one tower.

        Args:
            part: What it was given, a `Call`, or a dict with one as `"call"`.
            counts: How many rows each tower here has. Defaults to what is known of this one.
        """
        call = part.get("call", part)
        leaves = self._cut_leaves(call)
        known = [
            tuple(output.shape) for output in getattr(self._tower.template, "outputs", None) or []
        ]
        # A call may have nothing to cut but what all towers get whole.
        counts = [*counts] or [leaves[0].shape[0] if leaves else None]
        sizes, left = (functools.partial(self._sizes, call, left=left) for left in (False, True))
        layers = _compat.all_layers(self._tower.template)
        layer = functools.partial(left_behind.name_of, layers)
        tower = self._tower
        joins = list if "whole" in self._rules.values() else tower.joins
        return Given(
            counts,
            leaves,
            sizes,
            known,
            left,
            layer,
            joins,
            tower.penalty,
            tower.kind_of_left,
            tower.counts,
        )

    def _sizes(self, call: Call, rows: int, *, left: bool) -> Any:
        """The outputs of a call with another number of rows, symbolically, or what it leaves."""
        cut = {id(leaf) for leaf in self._cut_leaves(call)}

        def resized(leaf: Any) -> Any:
            known = symbol(leaf)
            if id(leaf) not in cut:
                return known
            return keras.KerasTensor((rows, *known.shape[1:]), known.dtype, sparse=known.sparse)

        given = {part: mapped(resized, call[part]) for part in ("args", "kwargs")}
        key = str(given)
        if key not in self._known_sizes:
            with left_behind.noting(_compat.all_layers(self._tower.template)) as noted:
                outputs = self._tower.template.compute_output_spec(
                    *given["args"], **given["kwargs"]
                )
            self._known_sizes[key] = outputs, noted
        return self._known_sizes[key][left]

    def sort(
        self, gradients: list[Any], name: str, again: Callable[..., Any], given: tuple[Any, ...]
    ) -> list[Any]:
        """Takes sparse gradients of one tower apart by kind, so that their sum is that of one.

        Args:
            gradients: For each weight a tensor, `tf.IndexedSlices` or `None`.
            name: Which gradients they are.
            again: Function that computes the same gradients anew.
            given: Its arguments: what a tower is called with.

        Returns:
            A list like the one given.
        """
        if self._alone:
            return gradients
        _, number, _, part = given[:4]
        varies = flatten([*self._cut_leaves(part), number])
        return self._sorting.sort(gradients, varies, name, again, given)

    def sorter(self, body: Body, given: tuple[Any, ...], training: Any, watch: Watch) -> Sort:
        """What takes the gradients of one tower's call apart, by which outputs they come from."""

        def sort(gradients: list[Any], reached: Sequence[bool]) -> list[Any]:
            name = f"call {training} {[*reached]}"

            def again(*given: Any) -> list[Any]:
                sources = watch(given[0], given[-1])
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(sources)
                    parts = body(*given, training).differentiable()
                targets = [part for part, reach in zip(parts, reached, strict=True) if reach]
                return self.sort(tape.gradient(targets, sources), name, again, given)

            return self.sort(gradients, name, again, given)

        return sort

    def _cut_leaves(self, part: Any) -> list[Any]:
        """The tensors of a tower's part that other towers do not have."""
        return [
            leaf
            for path, leaf in flatten_with_paths(part)
            if not (path and self._rules.get(str(path[-1])) == "whole")
            if tf.is_tensor(leaf) and leaf.shape.rank != 0
        ]
