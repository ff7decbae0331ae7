"""What a wrapped model runs on: its workers, and what is traced of it now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from parallel_keras.steps import checks
from parallel_keras.steps.building import build_template
from parallel_keras.steps.calls import Calls
from parallel_keras.steps.template_steps import TemplateSteps
from parallel_keras.towers.current import current
from parallel_keras.towers.run import Towers
from parallel_keras.workers import servers
from parallel_keras.workers.agreement import agree_on_state

if TYPE_CHECKING:
    from parallel_keras.workers.connection import Workers
    from parallel_keras.workers.message import AnyWorkers


class Runtime:
    """Keeps the template built, its weights where they belong, and its towers traced for them.

    Args:
        wrapper: The `DataParallelModel`.
        workers: Those that it is on one of.
        cluster: The same if there are several, else `None`.

    Attributes:
        agreed: Whether the workers have agreed on a start.
        by_xla: Whether XLA compiles the towers.
        calls: Runs calls of the template on its towers.
        template_steps: Runs steps of the template's own.
    """

    def __init__(self, wrapper: keras.Model, workers: AnyWorkers, cluster: Workers | None) -> None:
        self._wrapper = wrapper
        self.workers, self.cluster = workers, cluster
        self.agreed = False
        self.compile_towers()

    def compile_towers(self, *, jit: bool = False, eager: bool = False) -> None:
        """Makes the towers anew, compiled by XLA or not traced at all if so asked.

        Args:
            jit: Whether XLA compiles them. Defaults to `False`.
            eager: Whether nothing is traced. Defaults to `False`.
        """
        self.by_xla, self._eager = jit, eager
        self._make_calls()

    def settle(self, *, running: bool = False) -> None:
        """Moves weights, and what the optimizer keeps for them, that have come since.

        Args:
            running: Whether a function of this model runs, which is not traced yet and knows
                nothing that moves. Defaults to `False`.
        """
        with servers.naming_faults():
            moved = self._wrapper.homes.settle()
        if not moved:
            return
        # What was traced knows variables where they were.
        self._make_calls()
        template = self._wrapper.template
        for model in (template,) if running else (self._wrapper, template):
            model.train_function = model.test_function = model.predict_function = None

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the template's weights from the shapes and dtypes of a batch.

        Args:
            args: Positional arguments of a call, or their specs.
            kwargs: Keyword arguments of a call.
        """
        template = self._wrapper.template
        build_template(template, args, kwargs)
        self.settle()
        if self.cluster is not None:
            checks.check_built(template)
            agree_on_state(self._wrapper, self.cluster)

    def build_early(self, inputs: Any) -> None:
        """Makes the template's weights before the first step, where that can be.

        Args:
            inputs: What is known of the inputs of a batch.
        """
        try:
            self.build((inputs,), {})
        except Exception:
            if not self._wrapper.run_eagerly:
                raise
            # What only runs eagerly gets its weights from the batch itself, in the first step.
            self._wrapper.template.built = False

    def _make_calls(self) -> None:
        template = self._wrapper.template
        self.calls = self._calls_of(template)
        self.template_steps = TemplateSteps(template, self._calls_of, self._wrapper.homes)

    def _calls_of(self, model: keras.Model) -> Calls:
        """What runs calls of the template, or of a model that is part of it."""
        on, jit, eager = self._wrapper, self.by_xla, self._eager

        def towers() -> Towers:
            place = (on.devices, on.merge_device, on.request["rules"], self.workers, on.homes)
            return Towers(model, *place, jit=jit, eager=eager)

        return Calls(current(towers), eager=eager)
