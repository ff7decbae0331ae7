"""The towers of a model: a batch is cut, a function traced once runs on each device, and merged."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import merge
from parallel_keras.devices import check_one_job
from parallel_keras.graphs.graph import hide_sizes, hide_value, naming_tower
from parallel_keras.graphs.outputs import Given
from parallel_keras.homes.links import are_far
from parallel_keras.homes.messages import Copies, sums
from parallel_keras.homes.plan import Homes
from parallel_keras.shard import Shards
from parallel_keras.slices import is_sparse
from parallel_keras.towers.collectives import Peers, make_tokens, meet, token
from parallel_keras.towers.function import Body, Functions
from parallel_keras.towers.gathering import brought, merge_state
from parallel_keras.towers.inquiry import Inquiry, Watch
from parallel_keras.towers.needs import TraceAgain
from parallel_keras.towers.results import Pass, State, Taped
from parallel_keras.towers.state import StateRules
from parallel_keras.towers.tower import Tower
from parallel_keras.towers.weights import read
from parallel_keras.workers.message import AnyWorkers, Columns

# Towers that do not talk to each other need a token of any device.
_ANYWHERE = ("/device:CPU:0",)


class Towers:
    """Runs a template on several devices, a tower on each.

    They are those of the template as it is when they are made: where weights come, go or
    are frozen later, `current` makes others.

    Args:
        template: The model. Its variables are read once a pass and copied to
            each device; what it assigns is merged by `StateRules`.
        devices: Canonical device names.
        merge_device: Where batches are cut and results are merged.
        rules: What to do with single inputs and outputs, by name.
        workers: Those that these are the towers of one of.
        homes: Where the template's variables live.
        jit: Whether XLA compiles the tower function. Defaults to `False`.
        eager: Whether the tower function is not traced at all. Defaults to `False`.
    """

    def __init__(
        self,
        template: keras.Model,
        devices: tuple[str, ...],
        merge_device: str,
        rules: Mapping[str, str],
        workers: AnyWorkers,
        homes: Homes,
        *,
        jit: bool = False,
        eager: bool = False,
    ) -> None:
        self.template = template
        self.devices = devices
        self.merge_device = merge_device
        self.rules = rules
        self.workers = workers
        self.homes = homes
        self.tower = Tower(template, declared="add_loss" in rules)
        loops, moving = self.tower.in_loops, self.tower.moving
        self._state_rules = StateRules(template, loops, moving, rules)
        synchronized = self._state_rules.synchronized
        if synchronized:
            check_one_job(devices)
        # Keras chooses XLA by itself on GPUs; towers that talk to each other cannot have it.
        alone = workers.towers == 1 or not synchronized
        self._eager = eager
        make_tokens(devices if synchronized else _ANYWHERE)
        self._functions = Functions(
            self.tower, workers, homes, jit=jit and alone, eager=eager, talks=synchronized
        )
        self.inquiry = Inquiry(self.tower, rules, alone=workers.towers == 1)

    @property
    def alone(self) -> bool:
        """Whether there is one tower only, here and on all workers."""
        return self.workers.towers == 1

    @property
    def trainable(self) -> list[int]:
        """The numbers of the template's variables that gradients are taken for."""
        return [
            index
            for index, variable in enumerate(self.template.variables)
            if variable.trainable and tf.as_dtype(variable.dtype).is_floating
        ]

    def on(self, device: str) -> Towers:
        """The first of these towers on another device, with the same traces.

        Args:
            device: Canonical device name.
        """
        moved = copy.copy(self)
        moved.devices = (device,)
        return moved

    def untraced(self) -> Towers:
        """These towers for a model that cannot be traced: they run one after the other."""
        place = (self.devices, self.merge_device, self.rules, self.workers, self.homes)
        return Towers(self.template, *place, eager=True)

    @property
    def talk(self) -> bool:
        """Whether towers talk to each other, and so must run at the same time."""
        return self._state_rules.synchronized and not self.alone

    def shard(self, batch: Any, *, fed_here: bool = False) -> Shards:
        """Cuts a batch, on the merge device.

        Args:
            batch: Nest of tensors.
            fed_here: Whether it holds the rows of this worker only, where each feeds its own.

        Returns:
            The `Shards`.
        """
        whole = {name for name, rule in self.rules.items() if rule == "whole"}
        with tf.device(self.merge_device):
            shards = self.workers.cut(batch, whole, fed_here=fed_here)
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
        handles = tables and not (self._functions.jit or self._eager)
        source = self.tower.tables.source if handles else read
        return [source(variable, self.homes.of(variable)) for variable in self.template.variables]

    def forward(
        self,
        shards: Shards,
        weights: list[tf.Tensor],
        training: Any,
        watch: Watch | None = None,
        *,
        once: bool = False,
    ) -> Pass:
        """Calls the template on all towers.

        Args:
            shards: The arguments, a `Call` cut by rows.
            weights: The values of the template's variables.
            training: Bool or `None`, the argument of that name.
            watch: Function from a tower's weights and its part of the call to
                the tensors that gradients will be taken for. Defaults to none.
            once: Whether gradients are taken once, and not of gradients. Else TensorFlow
                prepares for derivatives of derivatives, which takes longer than the forward
                pass, and which some operations do not have. Defaults to `False`.

        Returns:
            The `Pass`.
        """
        tapes: list[Taped] = []

        def run(body: Body, device: str, *given: Any) -> Any:
            if watch is None:
                return body(*given, training)
            # It also finds the variables that Keras does not know.
            tape = tf.GradientTape(persistent=not once)
            taped = Taped(device, tape, watch(given[0], given[-1]))
            if not self.alone:
                taped.sort = self.inquiry.sorter(body, given, training, watch)
                taped.number = self.workers.first + self.devices.index(device)
            with tape:
                tape.watch(taped.sources)
                result = body(*given, training)
            tapes.append(taped)
            return result

        here = self.run(self.tower.call, shards, weights, run)
        results = self.workers.join(here, "call", shards)
        state = self.merge_state(results, weights, shards)
        given = self.given(shards)
        return Pass(shards, results, here, state, self.rules, self.merge_device, given, tapes)

    def given(self, shards: Shards) -> Given:
        """What is known of a call of the template besides what its towers return.

        Args:
            shards: What they were given.
        """
        first = self.workers.first
        counts = shards.rows[first : first + len(shards.parts)]
        return self.inquiry.given_to(shards.parts[0], counts)

    def run(
        self,
        body: Body,
        shards: Shards,
        weights: list[tf.Tensor],
        call: Callable[..., Any],
        *,
        inline: bool = True,
    ) -> list[Any]:
        """Runs `call(body, device, weights, number, peers, part)` on each device with a part.

        Args:
            body: The tower function.
            shards: What it is called with.
            weights: The values of the template's variables.
            call: Calls the tower function.
            inline: Whether TensorFlow may put the towers' operations into the step's
                graph. If not, it optimises each tower by itself, all at the same time;
                but it may where devices are `are_far` apart. Defaults to `True`.

        Returns:
            What each tower returned, small things on the merge device.
        """
        inline = inline or are_far((*self.devices, self.merge_device))
        try:
            return self._run(body, shards, weights, call, inline=inline)
        except TraceAgain as found:
            # Each time something is learned, so this ends.
            self._functions.learn(found)
            return self.run(body, shards, weights, call, inline=inline)

    def _run(
        self,
        body: Body,
        shards: Shards,
        weights: list[tf.Tensor],
        call: Callable[..., Any],
        *,
        inline: bool,
    ) -> list[Any]:
        inline = inline or len(shards.parts) == 1
        peers = self._peers(shards)
        copies = Copies(weights, [self.homes.of(v) for v in self.tower.variables[: len(weights)]])
        results = []
        for index, (device, part) in enumerate(zip(self.devices, shards.parts, strict=False)):
            number = self.workers.first + index
            noting = self._state_rules.noting_scalars() if self._eager else contextlib.nullcontext()
            with tf.device(device), naming_tower(number, device), noting:
                told = hide_value(tf.constant(number)) if len(shards.rows) > 1 else None
                function = self._functions.of(body, number, inline=inline)
                given = self._functions.given(device, copies.at(device), told)
                result = call(function, device, given, told, peers[index], self._blur(part))
                results.append(brought(result, device, self.merge_device, first=index == 0))
        return results

    def summed(self, columns: Columns, variables: Sequence[keras.Variable]) -> Columns:
        """Adds up the gradients of the towers here, each where its weight lives.

        Sparse ones stay apart: their sum has as many rows as all of them. And of some weights of
        float8 layers the gradient is the new value, made of the largest values that were met.

        Args:
            columns: For each weight its gradient on each tower.
            variables: The weights.

        Returns:
            For each weight a column of which the first is the sum, and the rest `None`.
        """
        news = {i for i, v in enumerate(variables) if getattr(v, "overwrite_with_gradient", False)}
        check_one_machine([variables[index].path for index in sorted(news)], self.workers.size)
        dense = [
            index
            for index, column in enumerate(columns)
            if index not in news and not _is_sparse(column)
        ]
        homes = [self.homes.of(variables[index]) for index in dense]
        found = [list(column) for column in columns]
        added = sums([columns[index] for index in dense], self.devices, homes)
        for index in news:
            with tf.device(self.homes.of(variables[index])):
                dense.append(index)
                added.append(merge.largest(columns[index]))
        for index, value in zip(dense, added, strict=True):
            found[index] = [value, *[None] * (len(columns[index]) - 1)][: len(columns[index])]
        return found

    def merge_state(self, results: list[Any], weights: list[tf.Tensor], shards: Shards) -> State:
        """The merged new value of every variable that the towers assigned."""
        rules, variables, device = self._state_rules, self.tower.variables, self.merge_device
        return merge_state(rules, variables, self.homes, device, results, weights, shards)

    def _peers(self, shards: Shards) -> list[Peers | tf.Tensor | None]:
        """What joins the towers of one pass, or keeps them apart."""
        devices = self.devices[: len(shards.parts)]
        workers, synchronized = self.workers, self._state_rules.synchronized
        single = len(devices) == 1 and not (synchronized and workers.size > 1)
        if single or self._eager or self._functions.jit:
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


def check_one_machine(paths: list[str], workers: int) -> None:
    """Refuses weights that are overwritten by their gradient where there are several machines.

    Args:
        paths: The paths of such weights.
        workers: Int, how many machines there are.

    Raises:
        ValueError: If there are both.
    """
    if paths and workers > 1:
        raise ValueError(
            "Expected weights whose gradients can be added up over machines: those of float8 "
            f"layers are new values. Received: {', '.join(paths)}, on {workers} machines. "
            "Train them on one machine, or without quantize('float8')."
        )


def _is_sparse(column: Sequence[Any]) -> bool:
    return any(map(is_sparse, column))
