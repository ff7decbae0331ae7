"""What towers return from one call of a model, and the way back for gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.graphs.outputs import Given, are_by_rows, found_rules, is_same
from parallel_keras.nests import floats, is_float, replaced
from parallel_keras.shard import Shards
from parallel_keras.towers import left_behind
from parallel_keras.towers.left_behind import Left
from parallel_keras.towers.losses import term_rule
from parallel_keras.towers.recompute import RecomputeScope
from parallel_keras.workers.message import Message

# Values that a tower gave to a variable, in order, by the number of the variable.
Updates = dict[int, list[tf.Tensor]]
# From gradients, and which parts of a tower's result they come from, to gradients by kind.
Sort = Callable[[list[Any], Sequence[bool]], list[Any]]
# The new value of each variable that was assigned.
State = list[tuple[keras.Variable, tf.Tensor]]


class CallResult(NamedTuple):
    """What one tower returns from one call of the model.

    Attributes:
        outputs: Nest of tensors.
        masks: Their masks, a nest like it.
        logits: What a softmax or sigmoid at the end was computed from, a nest like it.
        terms: What layers gave to `add_loss`, see `Tower.terms`.
        activities: What activity regularisers will see of the whole batch, by the number of
            the layer.
        left: What was left on layers, see `left_behind`.
        state: What was assigned and depends on the shard.
        constant: What was assigned and does not.
    """

    outputs: Any
    masks: Any
    logits: Any
    terms: dict[str, list[tf.Tensor]]
    activities: dict[str, list[tf.Tensor]]
    left: Left
    state: Updates
    constant: Updates

    def differentiable(self) -> list[tf.Tensor]:
        """Everything that a gradient can flow to."""
        return floats((self.outputs, self.logits, self.terms, self.activities, self.left))

    def told_apart(self) -> CallResult:
        """The same, with a tensor of its own in each place.

        A gradient is asked for each, and of one tensor in two places it would be that of both.
        """
        places = self.differentiable()
        if len({id(tensor) for tensor in places}) == len(places):
            return self
        firsts: dict[int, int] = {}
        news = [
            tf.identity(tensor) if firsts.setdefault(id(tensor), place) != place else tensor
            for place, tensor in enumerate(places)
        ]
        names = ("outputs", "logits", "terms", "activities", "left")
        fields = tuple(getattr(self, name) for name in names)
        return self.changed(**dict(zip(names, replaced(fields, news, is_float), strict=True)))

    def changed(self, **fields: Any) -> CallResult:
        """The same, with other values in some fields."""
        return self._replace(**fields)

    def message(self) -> Message:
        """What the other workers need of it."""
        # Terms that are no numbers may have rows, of which each tower has others.
        numbers = _terms(self.terms, lambda term: term.shape.rank == 0)
        others = _terms(self.terms, lambda term: term.shape.rank != 0)
        by_rows = (self.outputs, self.masks, self.logits, self.activities, others, self.left)
        return Message([], by_rows, (), numbers, (self.state, self.constant))

    def received(self, message: Message) -> CallResult:
        """The result of the tower that the message is from."""
        outputs, masks, logits, activities, others, left = message.by_rows
        numbers, (state, constant) = message.terms, message.state
        terms = {}
        for owner, mine in self.terms.items():
            scalars, vectors = iter(numbers.get(owner, [])), iter(others.get(owner, []))
            terms[owner] = [next(vectors if term.shape.rank else scalars) for term in mine]
        return CallResult(outputs, masks, logits, terms, activities, left, state, constant)


class Merged(NamedTuple):
    """What one call of the model gives.

    Attributes:
        outputs: Nest of tensors, rows in order.
        masks: Their masks, a nest like it.
        logits: What a softmax or sigmoid at the end was computed from, a nest like it.
        terms: What layers gave to `add_loss`, by the number of the layer.
        left: What was left on layers, see `left_behind`.
    """

    outputs: Any
    masks: Any
    logits: Any
    terms: dict[str, list[tf.Tensor]]
    left: Left

    def attached(self, model: keras.Model) -> Any:
        """The outputs, with masks and logits attached as Keras does.

        Args:
            model: The model that was called; on its layers is put what was left there.
        """
        if self.left:
            left_behind.put(_compat.all_layers(model), self.left)
        keras.tree.map_structure(_compat.set_mask, self.outputs, self.masks)
        keras.tree.map_structure(_compat.set_logits, self.outputs, self.logits)
        return self.outputs


@dataclasses.dataclass
class Taped:
    """The way back through one tower.

    Attributes:
        device: Where the tower ran.
        tape: The tape of its gradients.
        sources: The tensors to take gradients for.
        sort: Takes sparse gradients apart by kind; given them, and which parts they come from.
        number: The number of the tower, `None` if it is the only one.
    """

    device: str
    tape: tf.GradientTape
    sources: list[tf.Tensor]
    sort: Sort | None = None
    number: int | None = None

    def gradients(
        self,
        parts: list[tf.Tensor],
        upstream: Sequence[tf.Tensor | None],
        others: Sequence[tf.Variable] = (),
    ) -> list[Any]:
        """Gradients of the sources, computed on the tower's device.

        Args:
            parts: What the tower returned and a gradient may flow to.
            upstream: The gradients of those.
            others: Further sources: variables that are not the model's. Defaults to none.

        Returns:
            A list, one entry for each source.
        """
        sources = [*self.sources, *others]
        reached = [(part, up) for part, up in zip(parts, upstream, strict=True) if up is not None]
        if not reached:
            return [None] * len(sources)
        targets, ups = zip(*reached, strict=True)
        number = self.number
        again = contextlib.nullcontext() if number is None else RecomputeScope(number)
        with tf.device(self.device):
            with again:
                found = self.tape.gradient(list(targets), sources, output_gradients=list(ups))
            if self.sort is None:
                return found
            count = len(self.sources)
            return [*self.sort(found[:count], [up is not None for up in upstream]), *found[count:]]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What the towers returned from one call.

    Attributes:
        shards: The `Shards` they were given.
        results: What each tower of all workers returned.
        here: What each tower of this worker returned; they are all, without other workers.
        state: The merged new value of each variable that was assigned.
        rules: How outputs and losses are joined, by name.
        merge_device: Where.
        given: What is known of the call besides.
        tapes: For each tower here the way back; empty if there is none.
    """

    shards: Shards
    results: list[CallResult]
    here: list[CallResult]
    state: State
    rules: Mapping[str, str]
    merge_device: str
    given: Given
    tapes: list[Taped] = dataclasses.field(default_factory=list)

    def merged(self, *, in_parts: bool = False) -> Merged:
        """What the towers returned as one, on the merge device.

        Args:
            in_parts: Whether what would be concatenated may stay in `Parts`.
        """
        with tf.device(self.merge_device):
            found: Mapping[int, str] = {}
            if len(self.results) > 1:
                parts = [result.outputs for result in self.here]
                found = found_rules(parts, self.rules, self.given)
            outputs, masks, logits = (
                merge.outputs(list(column), self.shards, self.rules, found, in_parts=in_parts)
                for column in zip(
                    *[(r.outputs, r.masks, r.logits) for r in self.results], strict=True
                )
            )
            terms = self._terms()
            return Merged(outputs, masks, logits, terms, self._left())

    def _left(self) -> Left:
        """What was left on layers, of the whole batch."""
        parts = [result.left for result in self.results]
        if len(parts) == 1:
            return parts[0]
        merged: Left = self._tensors_left(parts) if parts[0] else {}
        for number, name in self.given.rows_left():
            merged.setdefault(number, {}).setdefault(name, self.shards.total)
        return merged

    def _tensors_left(self, parts: list[Left]) -> Left:
        here = [result.left for result in self.here]
        try:
            found = found_rules(here, self.rules, self.given.of_left())
            merged: Left = merge.outputs(parts, self.shards, self.rules, found)
        except ValueError as error:
            raise ValueError(self.given.on_layers(str(error))) from error
        for number, tensors in parts[0].items():
            for path, tensor in tensors.items():
                # Of an output the user knows that it is a mean; this is read by some code.
                if tensor.shape.rank == 0 and path.split("/")[-1] not in self.rules:
                    column = [part[number][path] for part in parts]
                    merged[number][path] = self._number(f"{number}/{path}", column)
        return merged

    def _number(self, path: str, column: list[tf.Tensor]) -> tf.Tensor:
        """A single number that was left on a layer, of the whole batch."""
        kind = self.given.kind(path)
        if column[0].dtype == tf.bool and kind not in ("max", "min"):
            # A few rows may all be on one side.
            if is_same(column, self.given.tensors):
                return column[0]
            kind = "none"
        if kind == "none":
            name = path.rsplit("/", maxsplit=1)[-1]
            raise ValueError(
                f"Expected a number that can be made of those of parts of the batch. Received: "
                f"{self.given.layer(path)}, which is no mean or sum over rows, and not the largest "
                "or smallest of them. Leave what it is made of, with the rows first, and compute "
                "it where it is read; or have it taken for a mean, which differs from one device: "
                f'rules={{{name!r}: "mean"}}; or use one device: devices=1.'
            )
        if kind in ("max", "min"):
            # Towers without rows have a copy of the last one.
            wide = tf.cast(column, tf.int32) if column[0].dtype == tf.bool else tf.stack(column)
            pick = tf.reduce_max if kind == "max" else tf.reduce_min
            return tf.cast(pick(wide), column[0].dtype)
        join = merge.live_sum if kind in ("rows", "sum") else merge.mean
        return join(column, self.shards.shares())

    def _terms(self) -> dict[str, list[tf.Tensor]]:
        """What layers gave to `add_loss`, of the whole batch, by the number of the layer."""
        found: dict[str, list[tf.Tensor]] = {}
        for key in self.results[0].terms:
            source, owner = key.split("/")
            here = zip(*[result.terms[key] for result in self.here], strict=True)
            everyone = zip(*[result.terms[key] for result in self.results], strict=True)
            found.setdefault(owner, []).extend(
                self._term(list(column), list(mine), source)
                for column, mine in zip(everyone, here, strict=True)
            )
        for owner in self.results[0].activities:
            for column in zip(*[result.activities[owner] for result in self.results], strict=True):
                activity = merge.outputs(list(column), self.shards)
                found.setdefault(owner, []).append(self.given.penalty(owner, activity))
        return found

    def _term(self, column: list[tf.Tensor], here: list[tf.Tensor], source: str) -> tf.Tensor:
        if len(column) == 1:
            return column[0]
        if are_by_rows(here, self.given):
            return merge.outputs(column, self.shards)
        join = merge.live_sum if term_rule(source, self.rules) == "sum" else merge.mean
        return join(column, self.shards.shares())

    def parts(self) -> list[list[tf.Tensor]]:
        """For each tower here, everything of its result that a gradient can flow to."""
        return [result.differentiable() for result in self.here]

    def gradients(
        self,
        upstream: Sequence[Sequence[tf.Tensor | None]],
        others: Sequence[tf.Variable] = (),
    ) -> list[list[Any]]:
        """Gradients of each tower's sources, computed on its device.

        Args:
            upstream: For each tower the gradients of its `parts()`.
            others: Further sources, for all towers. Defaults to none.

        Returns:
            For each tower a list, one entry for each source.
        """
        columns = zip(self.tapes, self.parts(), upstream, strict=True)
        return [tower.gradients(parts, ups, others) for tower, parts, ups in columns]


def assign(state: State) -> None:
    """Gives variables the values that the towers' assignments came to."""
    for variable, value in state:
        variable.assign(value)


def _terms(
    terms: dict[str, list[tf.Tensor]], which: Callable[[tf.Tensor], bool]
) -> dict[str, list[tf.Tensor]]:
    return {owner: [term for term in some if which(term)] for owner, some in terms.items()}
