"""What happens in a tower: the template is called as a pure function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import depends_on
from parallel_keras.towers import left_behind, probe
from parallel_keras.towers.call import Call, by_name, given
from parallel_keras.towers.collectives import Peers, talking_to
from parallel_keras.towers.losses import activity_penalty
from parallel_keras.towers.moving import Moving, specs
from parallel_keras.towers.reachable import whole_numbers
from parallel_keras.towers.recompute import values_are_known
from parallel_keras.towers.results import CallResult, Updates
from parallel_keras.towers.saying import warn_once
from parallel_keras.towers.scope import Assigned, Lent, TowerScope
from parallel_keras.towers.weights import Tables

_TAKEN_FOR_A_MEAN = {
    "none": "Layer %s adds a term to the loss that is no mean or sum over rows: it is taken for "
    "one, of the parts of the batch, and so is another number than on one device.",
    "unknown": "Layer %s adds a term to the loss, and it could not be found out whether that is a "
    "mean or a sum over rows: it is taken for a mean. If it is none, the loss is another number "
    'than on one device. To say it for all terms: rules={"add_loss": "sum"}, or "mean".',
}


class Tower:
    """The template as a pure function: weights and a part of the batch in, results out.

    Args:
        template: The model.
        declared: Whether it is declared how terms of `add_loss` are joined. Defaults to `False`.

    Attributes:
        tables: The embedding tables that stay where they are.
        count: How many variables the template has.
        in_loops: The ids of the variables of which only the last value is known, because they
            were assigned inside of a loop or condition.
        moving: Finds out how layers move floats.
    """

    def __init__(self, template: keras.Model, *, declared: bool = False) -> None:
        self.template = template
        self._declared = declared
        self.tables = Tables(template)
        self.moving = Moving(template)
        self._variables: list[keras.Variable] = list(template.variables)
        self.count = len(self._variables)
        self.in_loops: set[int] = set()
        self._called: tuple[Call, Any] | None = None
        self._lent = Lent()

    @contextlib.contextmanager
    def lent(self, lent: Lent) -> Iterator[None]:
        """Inside, scopes have this besides the values of variables."""
        self._lent, before = lent, self._lent
        try:
            yield
        finally:
            self._lent = before

    @property
    def variables(self) -> list[keras.Variable]:
        """The template's variables, and then those of others that it assigned."""
        return self._variables

    def call(
        self,
        weights: list[tf.Tensor],
        number: tf.Tensor | None,
        peers: Peers | tf.Tensor | None,
        call: Call,
        training: Any,
    ) -> CallResult:
        """One call of the template; nothing outside of it is changed.

        Args:
            weights: A value, or a handle, for each of the template's variables.
            number: Integer tensor `()`, the number of the tower, or `None` if there is one.
            peers: What joins the tower to the others, or keeps it apart.
            call: The tower's part of the call.
            training: Bool or `None`, the argument of that name.

        Returns:
            The `CallResult`.
        """
        with self.scope(weights, number) as scope, talking_to(peers):
            outputs = self.call_template(scope, call, training)
        state, constant = self.updates(scope, (call, number))
        masks = keras.tree.map_structure(_compat.get_mask, outputs)
        logits = keras.tree.map_structure(_compat.get_logits, outputs)
        terms, left = self.terms(scope), scope.left
        result = CallResult(outputs, masks, logits, terms, scope.activities, left, state, constant)
        return result.told_apart()

    def scope(
        self,
        weights: list[tf.Tensor],
        number: tf.Tensor | None,
        others: Sequence[keras.Variable] = (),
        values: Sequence[tf.Tensor] = (),
    ) -> TowerScope:
        """A scope in which the template's variables, and others, have these values."""
        # There are more variables than the template's only where it assigned those of others.
        pairs = zip(self._variables, [*weights, *self._lent.extras], strict=False)
        known = [(variable, given) for variable, given in pairs if given is not None]
        variables = [variable for variable, _ in known]
        return TowerScope(
            [*variables, *others], [*(given for _, given in known), *values], number, self._lent
        )

    def call_template(self, scope: TowerScope, call: Call, training: Any) -> Any:
        """Calls the template with the masks of its arguments attached to them."""
        self._called = call, training
        keras.tree.map_structure(_compat.set_mask, call["args"], call["masks"])
        layers = _compat.all_layers(self.template)
        noting = self.moving.noting_calls()
        _compat.forget_loss_owners(self.template)
        with (
            scope.telling_activity(layers),
            self.tables.looking_up(scope),
            noting,
            left_behind.noting(layers) as left,
        ):
            args, kwargs = by_name(self.template, call["args"], call["kwargs"])
            outputs = self.template(*args, **given(training), **kwargs)
        scope.left = left
        return outputs

    def counts(self) -> list[tuple[str, str]]:
        """Where a call has left the number of its rows as a Python integer.

        Returns:
            Pairs of the number of a layer and the name of an attribute.
        """
        return [
            (str(number), name)
            for number, layer in enumerate(_compat.all_layers(self.template))
            for name in whole_numbers(layer)
            if self.moving.left(layer, name) == "rows"
        ]

    def joins(self) -> probe.Answers:
        """How the outputs of parts become those of a batch, see `probe.answers`."""
        if self._called is None or not values_are_known():
            return []
        call, training = self._called
        if tf.is_tensor(training):
            return []  # Only the step that is traced will know it.
        masked = any(mask is not None for mask in keras.tree.flatten(call["masks"]))
        composite = any(
            tf.is_tensor(leaf) and not isinstance(leaf, tf.Tensor)
            for leaf in keras.tree.flatten(call)
        )
        if masked or composite:
            return []
        args, kwargs = by_name(self.template, call["args"], call["kwargs"])
        return probe.answers(self.template, specs((args, kwargs)), training)

    def terms(self, scope: TowerScope) -> dict[str, list[tf.Tensor]]:
        """What the template's layers gave to `add_loss`, by source and number of the layer.

        As on one device, terms of layers that Keras does not know of do not count.
        """
        # Layers that are tried are called again.
        owners = _compat.loss_owners(self.template)
        layers = _compat.all_layers(self.template)
        found: dict[str, list[tf.Tensor]] = {}
        for source, terms in scope.terms.items():
            counts: dict[int, int] = {}
            for term in terms:
                if id(term) not in owners:
                    continue
                owner = owners[id(term)]
                count = counts[owner] = counts.get(owner, -1) + 1
                several = scope.several and source == "add_loss" and not term.shape.rank
                kind = self._kind_of_term(layers[owner], count) if several else source
                found.setdefault(f"{kind}/{owner}", []).append(term)
        added = [key for key in found if not key.startswith("activity/")]
        self._tell_of_lost_terms(layers, {int(key.partition("/")[2]) for key in added})
        return found

    def _tell_of_lost_terms(self, layers: list[keras.layers.Layer], owners: set[int]) -> None:
        """Tells of terms that Keras loses: the trace of a layer's call keeps no `add_loss`."""
        traced = [one for one in layers if hasattr(one.call, "get_concrete_function")]
        for outer in traced:
            inside = set(map(id, _compat.all_layers(outer)))
            for owner in sorted(owners):
                if id(layers[owner]) in inside:
                    warn_once(
                        layers[owner],
                        "Other numbers than on one device: layer %s calls add_loss inside of a "
                        "tf.function, the call of %r. On one device Keras loses such a term once "
                        "that is traced; here it counts. Take off the @tf.function: Keras traces "
                        "the whole step anyway.",
                        layers[owner].path,
                        outer.name,
                    )

    def _kind_of_term(self, layer: keras.layers.Layer, count: int) -> str:
        """Whether a layer's term is a sum over rows, or what was declared of such terms."""
        kinds = self.moving.terms(layer)
        if kinds is None or self._declared:
            return "add_loss"
        # A layer that is called several times adds the same terms each time.
        kind = kinds[count % len(kinds)] if kinds else "unknown"
        if kind in _TAKEN_FOR_A_MEAN:
            warn_once(layer, _TAKEN_FOR_A_MEAN[kind], layer.path)
        return "found_sum" if kind == "sum" else "add_loss"

    def kind_of_left(self, path: str) -> str:
        """How a single number that was left on a layer depends on the rows.

        Args:
            path: The number of the layer and the path of the attribute, with a slash between.
        """
        number, _, attribute = path.partition("/")
        layer = _compat.all_layers(self.template)[int(number)]
        kind = self.moving.left(layer, attribute)
        if kind == "unknown":
            warn_once(
                layer,
                "A number that `call` leaves, %s, is taken for the mean of those of the parts of "
                "the batch: nothing could be found out about it.",
                left_behind.name_of([layer], f"0/{attribute}"),
            )
        return kind

    def penalty(self, number: str, activity: tf.Tensor) -> tf.Tensor:
        """The term that the activity regulariser of a layer makes of a whole batch."""
        layer = _compat.all_layers(self.template)[int(number)]
        return activity_penalty(layer.activity_regularizer, activity)

    def updates(
        self, scope: TowerScope, varies: Sequence[Any], ignore: Sequence[keras.Variable] = ()
    ) -> tuple[Updates, Updates]:
        """What was assigned: what depends on the shard, and what does not."""
        ignored = {id(variable) for variable in ignore}
        varying: Updates = {}
        constant: Updates = {}
        leaves = tf.nest.flatten(varies, expand_composites=True)
        sources = [leaf for leaf in leaves if isinstance(leaf, tf.Tensor)]
        for assigned in scope.updates.values():
            if id(assigned.variable) not in ignored:
                updates = varying if self._varies(assigned, sources) else constant
                updates[self.index(assigned.variable)] = self._values(assigned)
        return varying, constant

    def _varies(self, assigned: Assigned, sources: Sequence[tf.Tensor]) -> bool:
        if tf.executing_eagerly():
            return True
        if assigned.stand_in is not None:
            return assigned.varies
        return depends_on(assigned.values[-1], sources)

    def _values(self, assigned: Assigned) -> list[tf.Tensor]:
        if assigned.stand_in is None or not assigned.inside:
            return assigned.values
        self.in_loops.add(id(assigned.variable))
        return [assigned.stand_in.read_value()]

    def index(self, variable: keras.Variable) -> int:
        """The number of a variable; one that is not the template's gets the next."""
        for index, known in enumerate(self._variables):
            if known is variable:
                return index
        self._variables.append(variable)
        return len(self._variables) - 1
