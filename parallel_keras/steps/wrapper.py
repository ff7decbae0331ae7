"""What every part of the wrapper may rely on: its attributes, declared in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from parallel_keras.steps.overriding import overridden_loops

if TYPE_CHECKING:
    from parallel_keras.homes.plan import Homes
    from parallel_keras.steps.calls import Calls
    from parallel_keras.steps.template_steps import TemplateSteps
    from parallel_keras.workers.connection import Workers
    from parallel_keras.workers.message import AnyWorkers


class Wrapper(keras.Model):
    """Base of the parts of `DataParallelModel`, which sets these attributes.

    Attributes:
        template: The `keras.Model` that runs on the towers.
        devices: Tuple of canonical device names, one for each tower here.
        merge_device: String, where outputs and gradients are merged.
        loss_on: String, where the user wants the loss to be computed.
        request: Dict of the constructor's arguments as they were given.
        homes: Where the template's variables live.
    """

    template: keras.Model
    devices: tuple[str, ...]
    merge_device: str
    loss_on: str
    request: dict[str, Any]
    homes: Homes
    _workers: AnyWorkers
    _agreed: bool
    _cluster: Workers | None
    _calls: Calls
    _template_steps: TemplateSteps
    _towers_by_xla: bool
    _parallel_call: Any
    train_function: Any
    test_function: Any
    _inherit_compile: Callable[..., None]
    _settle: Callable[..., None]
    _build_template: Callable[[tuple[Any, ...], dict[str, Any]], None]

    @property
    def _template_loops(self) -> bool:
        """Whether the template runs its loops by itself."""
        template = vars(self).get("template")
        return template is not None and bool(overridden_loops(template))
