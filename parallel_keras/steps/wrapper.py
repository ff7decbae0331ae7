"""What every part of the wrapper may rely on: its attributes, declared in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from parallel_keras.steps.overriding import overridden_loops, overridden_steps

if TYPE_CHECKING:
    from parallel_keras.homes.plan import Homes
    from parallel_keras.steps.keras_steps import Steps
    from parallel_keras.steps.runtime import Runtime


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
    train_function: Any
    test_function: Any
    predict_function: Any
    _runtime: Runtime
    _steps: Steps

    @property
    def _template_loops(self) -> bool:
        """Whether the template runs its loops by itself."""
        template = vars(self).get("template")
        return template is not None and bool(overridden_loops(template))

    @property
    def _template_learns(self) -> bool:
        """Whether `fit` and `evaluate` take the template's own steps."""
        template = vars(self).get("template")
        return template is not None and bool(overridden_steps(template))
