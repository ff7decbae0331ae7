"""The pure tower function: traced once, run on each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.devices import check_one_job
from parallel_keras.shard import Shards
from parallel_keras.towers.collectives import Peers, make_tokens, meet, talking_to, token
from parallel_keras.towers.graph import depends_on, hide_sizes, hide_value, naming_tower
from parallel_keras.towers.results import Call, Pass
from parallel_keras.towers.scope import TowerScope
from parallel_keras.towers.state import StateRules, Updates, fingerprint
from parallel_keras.towers.weights import Tables, copies, read, value_of
from parallel_keras.workers.alone import Alone
from parallel_keras.workers.connection import Workers

# Towers that do not talk to each other need a token of any device.
_ANYWHERE = ("/device:CPU:0",)
Watch = Callable[[list[tf.Tensor], Any], list[tf.Tensor]]


class Towers:
    """Runs a template on several devices, a tower on each.

    Args:
        template: The model. Its variables are read once a pass and copied to
            each device; what it assigns is merged by `StateRules`.
        devices: Canonical device names.
        merge_device: Where batches are cut and results are merged.
        rules: What to do with single inputs and outputs, by name.
        workers: The `Workers` that these are the towers of one of. Defaults to
            `None`, no others.
    """

    def __init__(
        self,
        template: keras.Model,
        devices: tuple[str, ...],
        merge_device: str,
        rules: Mapping[str, str],
        workers: Workers | None = None,
    ) -> None:
        self.template = template
        self.devices = devices
        self.merge_device = merge_device
        self.rules = rules
        self.workers: Workers | Alone = workers or Alone(len(devices))
        self.configure(jit=False, eager=False)

    def configure(self, *, jit: bool, eager: bool) -> None:
        """How the towers run from now on: compiled by XLA, or op by op.

        Args:
            jit: Whether XLA compiles the tower function.
            eager: Whether the tower function is not traced at all.
        """
        self._variables: list[keras.Variable] = []
        self._fingerprint: tuple[Any, ...] = ()
        self._state_rules = StateRules(self.template)
        self._tables = Tables(self.template)
        # Keras chooses XLA by itself on GPUs; towers that talk to each other cannot have it.
        alone = self.workers.towers == 1 or not self._state_rules.synchronized
        self._jit, self._eager = jit and alone, eager
        make_tokens(self.devices if self._state_rules.synchronized else _ANYWHERE)
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def forward(
        self, shards: Shards, weights: list[tf.Tensor], training: Any, watch: Watch | None = None
    ) -> Pass:
        """Calls the template on all towers.

        Args:
            shards: The arguments, a `Call` cut by rows.
            weights: The values of the template's variables.
            training: Bool or `None`, the argument of that name.
            watch: Function from a tower's weights and its part of the call to
                the tensors that gradients will be taken for. Defaults to none.

        Returns:
            The `Pass`.
        """
        tapes: list[tf.GradientTape] = []
        sources: list[list[tf.Tensor]] = []

        def run(body: Callable[..., Any], own: list[tf.Tensor], *rest: Any) -> Any:
            if watch is None:
                return body(own, *rest, training)
            tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
            sources.append(watch(own, rest[-1]))
            tapes.append(tape)
            with tape:
                tape.watch(sources[-1])
                return body(own, *rest, training)

        results = self.on_each(self.on_tower, shards, weights, run)
        everyone = self.workers.join(results, "call", shards)
        state = self.merge_state(everyone, weights, shards)
        used = self.devices[: len(results)]
        return Pass(
            shards, everyone, results, state, self.rules, self.merge_device, used, tapes, sources
        )

    def cut(self, batch: Any, *, own: bool = False) -> Shards:
        """Shards a batch, on the merge device.

        Args:
            batch: Nest of tensors.
            own: Whether it is this worker's own, where each worker feeds its own rows.

        Returns:
            The `Shards`.
        """
        whole = {name for name, rule in self.rules.items() if rule == "whole"}
        with tf.device(self.merge_device):
            shards = self.workers.cut(batch, whole, own=own)
        if not shards.parts:
            raise ValueError(
                "Expected a batch with at least one row: the mean of no losses is not a number. "
                "Received: a batch of 0 rows. Leave empty batches out."
            )
        return shards

    def read_weights(self, *, tables: bool = False) -> list[tf.Tensor]:
        """The values of the template's variables, each read where it lives.

        Args:
            tables: Whether of large embedding tables there may be handles instead.
                Defaults to `False`.
        """
        self._notice_changes()
        source = self._tables.source if tables and not (self._jit or self._eager) else read
        return [source(variable) for variable in self._variables]

    def on_each(
        self,
        body: Callable[..., Any],
        shards: Shards,
        weights: list[tf.Tensor],
        run: Callable[..., Any],
        *,
        inline: bool = True,
    ) -> list[dict[str, Any]]:
        """Runs `run(body, weights, tower, peers, part)` on each device that has a part.

        Args:
            body: The tower function.
            shards: What it is called with.
            weights: The values of the template's variables.
            run: Calls the tower function.
            inline: Whether TensorFlow may put the towers' operations into the step's
                graph. If not, it optimises each tower by itself, all at the same time.

        Returns:
            What each tower returned.
        """
        # A function called by XLA is never inlined, and may not be told so.
        function = self._traced(body, inline=inline or self._jit or len(shards.parts) == 1)
        peers = self._peers(shards)
        results = []
        for index, part in enumerate(shards.parts):
            number = self.workers.first + index
            with tf.device(self.devices[index]), naming_tower(number, self.devices[index]):
                own = copies(weights)
                tower = hide_value(tf.constant(number)) if len(shards.rows) > 1 else None
                results.append(run(function, own, tower, peers[index], self._blur(part)))
        return results

    def merge_state(
        self, results: list[dict[str, Any]], weights: list[tf.Tensor], shards: Shards
    ) -> list[tuple[keras.Variable, tf.Tensor]]:
        """The merged new value of every variable that the towers assigned."""
        if not results[0]["state"] and not results[0]["constant"]:
            return []
        variables, given = self._variables, dict(enumerate(weights))
        states = [result["state"] for result in results]
        before = {index: value_of(given.get(index), variables[index]) for index in states[0]}
        constant = results[0]["constant"]
        with tf.device(self.merge_device):
            shares = shards.shares() if len(results) > 1 else []
            merged = self._state_rules.merge(variables, before, states, constant, shares)
        return [(variables[index], value) for index, value in sorted(merged.items())]

    def scope(
        self,
        weights: list[tf.Tensor],
        tower: tf.Tensor | None,
        others: Sequence[keras.Variable] = (),
        values: Sequence[tf.Tensor] = (),
    ) -> TowerScope:
        """A scope in which the template's variables, and others, have these values."""
        own = self._variables[: len(weights)]
        return TowerScope([*own, *others], [*weights, *values], tower)

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

    def call_template(self, scope: TowerScope, call: Call, training: Any) -> Any:
        """Calls the template with the masks of its arguments attached to them."""
        keras.tree.map_structure(_compat.set_mask, call["args"], call["masks"])
        layers = _compat.all_layers(self.template)
        with scope.telling_activity(layers), self._tables.looking_up(scope):
            return self.template(*call["args"], training=training, **call["kwargs"])

    def on_tower(
        self,
        weights: list[tf.Tensor],
        tower: tf.Tensor | None,
        peers: Peers | tf.Tensor | None,
        call: Call,
        training: Any,
    ) -> dict[str, Any]:
        """The tower function: nothing outside of it is changed."""
        with self.scope(weights, tower) as scope, talking_to(peers):
            outputs = self.call_template(scope, call, training)
        state, constant = self.updates(scope, (call, tower))
        return {
            "outputs": outputs,
            "masks": keras.tree.map_structure(_compat.get_mask, outputs),
            "logits": keras.tree.map_structure(_compat.get_logits, outputs),
            "losses": scope.terms,
            "state": state,
            "constant": constant,
        }

    def _traced(self, body: Callable[..., Any], *, inline: bool) -> Callable[..., Any]:
        # One tower in a graph needs no function: nothing is traced twice, as without this library.
        alone = self.workers.towers == 1 and not self._jit and not tf.executing_eagerly()
        if self._eager or alone:
            return body
        if body not in self._functions:
            self._functions[body] = tf.function(
                body,
                autograph=False,
                reduce_retracing=True,
                jit_compile=self._jit or None,
                experimental_attributes=None if inline else {"_noinline": True},
            )
        return self._functions[body]

    def _notice_changes(self) -> None:
        found = fingerprint(self.template)
        if found != self._fingerprint:
            self.configure(jit=self._jit, eager=self._eager)
            self._variables = list(self.template.variables)
            self._fingerprint = found
            if self._state_rules.synchronized:
                check_one_job(self.devices)

    def _index(self, variable: keras.Variable) -> int:
        """The number of a variable; one that is not the template's gets the next."""
        for index, known in enumerate(self._variables):
            if known is variable:
                return index
        self._variables.append(variable)
        return len(self._variables) - 1

    def _peers(self, shards: Shards) -> list[Peers | tf.Tensor | None]:
        """What joins the towers of one pass, or keeps them apart."""
        devices = self.devices[: len(shards.parts)]
        workers, synchronized = self.workers, self._state_rules.synchronized
        single = len(devices) == 1 and not (synchronized and workers.size > 1)
        if single or self._eager or self._jit:
            return [None] * len(devices)
        if not synchronized:
            return [token(*_ANYWHERE)] * len(devices)
        others = workers.towers - len(devices) if workers.size > 1 else 0
        rows = shards.rows[workers.first :][: len(devices)]
        return [*meet(devices, rows, others, workers.timeout)]

    def _blur(self, part: Any) -> Any:
        """Hides a known batch size where it must not become a constant of the tower.

        Templates that count rows must be told apart from those that count steps, see
        `StateRules`. And towers that talk to each other must take the same steps: if
        some know their size, they compute the gradient of other things.
        """
        rules = self._state_rules
        hidden = (rules.counts_rows or rules.synchronized) and not self._eager
        return hide_sizes(part) if hidden else part
