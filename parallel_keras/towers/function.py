"""The function that runs on a tower's device: what it is given, how it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from absl import logging

from parallel_keras import _compat
from parallel_keras.graphs.graph import is_handle
from parallel_keras.homes.plan import Homes
from parallel_keras.towers import findings, other_numbers
from parallel_keras.towers.needs import Needs, TraceAgain
from parallel_keras.towers.recompute import RecomputeScope
from parallel_keras.towers.scope import Lent
from parallel_keras.towers.seeds import is_seed, started, stream_of
from parallel_keras.towers.trace import Trace
from parallel_keras.towers.weights import read
from parallel_keras.workers.message import AnyWorkers

if TYPE_CHECKING:
    from parallel_keras.towers.tower import Tower

Body = Callable[..., Any]


class TowerFunction:
    """Calls a body with what stands for the template's variables, traced or not.

    Args:
        body: Function of the weights, the tower's number, its peers and more.
        tower: What the body belongs to.
        needs: What the towers of this model need.
        number: Int, the number of the only tower that this is for, `None` for all.
        options: Arguments of `tf.function`, `None` to call the body as it is.
        towers: Int, how many towers there are on all workers.
        talks: Whether they wait for each other in the middle.
    """

    def __init__(
        self,
        body: Body,
        tower: Tower,
        needs: Needs,
        number: int | None,
        options: dict[str, Any] | None,
        towers: int,
        *,
        talks: bool,
    ) -> None:
        self._body = body
        self._tower = tower
        self._needs = needs
        self._number = number
        self._alone = towers == 1
        self._talks = talks
        self._jit = bool(options and options.get("jit_compile"))
        self._function = None if options is None else tf.function(self._trace, **options)
        self._themselves: list[tf.Variable | None] = []
        self._autograph: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def __call__(self, given: list[Any], *rest: Any) -> Any:
        """Calls the body.

        Args:
            given: A tensor, or a `tf.Variable`, for each variable that the tower knows.
            *rest: What the body takes after the weights.

        Returns:
            What the body returns.
        """
        if self._function is None:
            return self._untraced(given, rest)
        direct = self._needs.as_variables - self._needs.stand_ins
        self._themselves = [value if i in direct else None for i, value in enumerate(given)]
        handed = [None if i in direct else value for i, value in enumerate(given)]
        # Under a tape, TensorFlow makes the function of the way back as soon as this one is called.
        again = contextlib.nullcontext() if self._alone else RecomputeScope(self._number or 0)
        self._autograph = _compat.autograph_here()
        with again:
            return self._function(handed, *rest)

    def _trace(self, handed: list[Any], *rest: Any) -> Any:
        # What is read as itself is no argument: those who look for it look for itself.
        pairs = zip(self._themselves, handed, strict=True)
        given = [value if itself is None else itself for itself, value in pairs]
        with stream_of(self._number or 0), _compat.inlined_functions(), self._autograph:
            return self._pure(given, rest)

    def _untraced(self, given: list[Any], rest: Sequence[Any]) -> Any:
        # One tower that is not traced is as the bare model: variables stand for themselves.
        if self._alone:
            return self._pure(given, rest)
        looked_at: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if tf.executing_eagerly():
            looked_at = findings.look_at_untraced(self._tower.template)
        with stream_of(self._number or 0), _compat.inlined_functions(), looked_at:
            return self._pure(given, rest)

    def _pure(self, given: list[Any], rest: Sequence[Any]) -> Any:
        known = self._tower.count
        stand_ins = {id(self._tower.variables[index]) for index in self._needs.stand_ins}
        lent = Lent(given[known:], stand_ins, self._function is None and self._alone)
        with self._tower.lent(lent):
            try:
                result = self._body(given[:known], *rest)
            except Exception:
                # The way back of a custom gradient may be lost without the variables it uses.
                if self._function is not None:
                    findings.look_for_hidden(self._trace_of(given, lent.inner_graphs))
                raise
        if self._function is not None:
            trace = self._trace_of(given, lent.inner_graphs)
            findings.look_at(trace)
            other_numbers.tell(trace)
        return result

    def _trace_of(self, given: list[Any], inner: list[Any]) -> Trace:
        return Trace(
            graph=tf.compat.v1.get_default_graph(),
            tower=self._tower,
            needs=self._needs,
            given=given,
            inner=inner,
            talks=self._talks,
            alone=self._alone,
            jit=self._jit,
        )


class Functions:
    """The functions of the towers of one model, traced as their traces have shown to be needed.

    Args:
        tower: What they call.
        workers: Those that the towers belong to one of.
        homes: Where weights live.
        jit: Whether XLA compiles them.
        eager: Whether they are not traced at all.
        talks: Whether towers wait for each other in the middle.

    Attributes:
        jit: Whether XLA compiles them, and can.
    """

    def __init__(
        self,
        tower: Tower,
        workers: AnyWorkers,
        homes: Homes,
        *,
        jit: bool,
        eager: bool,
        talks: bool,
    ) -> None:
        self.jit = jit
        self._tower = tower
        self._towers = workers.towers
        self._homes = homes
        self._eager = eager
        self._talks = talks
        self._needs = Needs()
        self._made: dict[tuple[Body, int | None], TowerFunction] = {}

    @property
    def are_traced(self) -> bool:
        """Whether there are functions at all."""
        # One tower in a graph needs none: nothing is traced twice, as without this library.
        alone = self._towers == 1 and not self.jit and not tf.executing_eagerly()
        return not (self._eager or alone)

    def of(self, body: Body, number: int, *, inline: bool) -> TowerFunction:
        """The function of a body.

        Args:
            body: What the tower does.
            number: Int, the number of the tower.
            inline: Whether TensorFlow may put its operations into the step's graph.

        Returns:
            A `TowerFunction`, the same each time if it is traced.
        """
        traced = self.are_traced
        only = number if self._needs.apart or not traced else None
        key = body, only
        if traced and key in self._made:
            return self._made[key]
        # A function called by XLA is never inlined, and may not be told so.
        attributes = None if inline or self.jit else {"_noinline": True}
        options = {
            "autograph": False,
            "reduce_retracing": True,
            "jit_compile": self.jit or None,
            "experimental_attributes": attributes,
        }
        made = TowerFunction(
            body,
            self._tower,
            self._needs,
            only,
            options if traced else None,
            self._towers,
            talks=self._talks,
        )
        if traced:
            self._made[key] = made
        return made

    def given(self, device: str, copied: list[Any], number: tf.Tensor | None) -> list[Any]:
        """What a tower gets for each variable that it knows.

        Args:
            device: Its device, which is the current one.
            copied: The values of the template's variables there.
            number: Integer tensor `()`, the number of the tower, `None` if there is one.

        Returns:
            A list of tensors, `tf.Variable`s and `None`.
        """
        needs, variables = self._needs, self._tower.variables
        if self.are_traced:
            themselves = needs.as_variables
        else:
            # Nobody can see there whether code looks for variables, so it always finds them.
            known = enumerate(variables[: self._tower.count])
            themselves = {i for i, v in known if self._towers == 1 or not is_seed(v)}
        given = [
            _itself(variables[index], value) if index in themselves else value
            for index, value in enumerate(copied)
        ]
        for index in sorted(needs.stand_ins):
            variable = variables[index]
            given += [None] * (index + 1 - len(given))
            value = copied[index] if index < len(copied) else None
            if value is None or is_handle(value):
                value = read(variable, self._homes.of(variable))
            value = started(value, variable, number)
            given[index] = needs.stand_in(device, index, variable, value)
        return given

    def learn(self, found: TraceAgain) -> None:
        """Traces towers from now on as a trace has shown to be needed.

        Args:
            found: What it has shown.
        """
        variables, needs = self._tower.variables, self._needs
        if found.stand_ins:
            # More of them are likely to be assigned in the same loop.
            state = {i for i, v in enumerate(variables[: self._tower.count]) if not v.trainable}
            needs.stand_ins |= state | {self._tower.index(v) for v in found.stand_ins}
        needs.as_variables |= {self._tower.index(v) for v in found.as_variables}
        needs.apart |= found.apart
        if found.no_xla:
            self.jit = False
            logging.warning(
                "Towers of %s are not compiled by XLA, although jit_compile=True: %s must be read "
                "where they are, by a custom gradient or a function that was traced elsewhere.",
                self._tower.template.name,
                ", ".join(variable.path for variable in found.as_variables),
            )
        self._made.clear()


def _itself(variable: keras.Variable, value: Any) -> Any:
    """The `tf.Variable` behind a variable, unless something stands for it out here, too."""
    behind = variable.value
    return value if is_handle(value) or not isinstance(behind, tf.Variable) else behind
