"""What happens in a tower: the template is called as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.towers.collectives import Peers, talking_to
from parallel_keras.towers.graph import depends_on
from parallel_keras.towers.losses import activity_penalty
from parallel_keras.towers.results import Call, CallResult, Updates, by_name, given
from parallel_keras.towers.scope import TowerScope
from parallel_keras.towers.weights import Tables


class Tower:
    """The template as a pure function: weights and a part of the batch in, results out.

    Args:
        template: The model.

    Attributes:
        tables: The embedding tables that stay where they are.
    """

    def __init__(self, template: keras.Model) -> None:
        self.template = template
        self.tables = Tables(template)
        self._variables: list[keras.Variable] = list(template.variables)

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
        terms = self.terms(scope)
        return CallResult(outputs, masks, logits, terms, scope.activities, state, constant)

    def scope(
        self,
        weights: list[tf.Tensor],
        number: tf.Tensor | None,
        others: Sequence[keras.Variable] = (),
        values: Sequence[tf.Tensor] = (),
    ) -> TowerScope:
        """A scope in which the template's variables, and others, have these values."""
        given = self._variables[: len(weights)]
        return TowerScope([*given, *others], [*weights, *values], number)

    def call_template(self, scope: TowerScope, call: Call, training: Any) -> Any:
        """Calls the template with the masks of its arguments attached to them."""
        keras.tree.map_structure(_compat.set_mask, call["args"], call["masks"])
        layers = _compat.all_layers(self.template)
        with scope.telling_activity(layers), self.tables.looking_up(scope):
            args, kwargs = by_name(self.template, call["args"], call["kwargs"])
            return self.template(*args, **given(training), **kwargs)

    def terms(self, scope: TowerScope) -> dict[str, list[tf.Tensor]]:
        """What the template's layers gave to `add_loss`, by source and number of the layer.

        As on one device, terms of layers that Keras does not know of do not count.
        """
        owners = _compat.loss_owners(self.template)
        found: dict[str, list[tf.Tensor]] = {}
        for source, terms in scope.terms.items():
            for term in terms:
                if id(term) in owners:
                    found.setdefault(f"{source}/{owners[id(term)]}", []).append(term)
        return found

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
        for variable, values in scope.updates.values():
            if id(variable) in ignored:
                continue
            tied = not tf.executing_eagerly() and not depends_on(values[-1], sources)
            (constant if tied else varying)[self._index(variable)] = values
        return varying, constant

    def _index(self, variable: keras.Variable) -> int:
        """The number of a variable; one that is not the template's gets the next."""
        for index, known in enumerate(self._variables):
            if known is variable:
                return index
        self._variables.append(variable)
        return len(self._variables) - 1
