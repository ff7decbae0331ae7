"""Loops that the template has made its own: they run on it, and each step on all devices.

Where a template has a `fit` or `predict` of its own (one that prepares its data, as the tasks of
KerasHub do), that must not be passed over. So the whole loop is the template's, and callbacks see
the template; but each step that the loop takes is one of the wrapper, on all devices, and so are
the files that are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from parallel_keras.steps.overriding import Redirected

if TYPE_CHECKING:
    from parallel_keras.steps.wrapper import Wrapper

# What a loop does with the model that runs it, and the wrapper does for the template.
_STEPS = ("train_step", "test_step", "predict_step")
_FILES = ("save", "save_weights", "export")
_FUNCTIONS = ("train_function", "test_function", "predict_function")
# What a loop leaves on the model that runs it.
_LEFT = ("history", "stop_training", "stop_evaluating", "stop_predicting")


def on_template(wrapper: Wrapper, name: str, settle: Callable[[], None]) -> Callable[..., Any]:
    """A method of the template, in which its steps and files are those of the wrapper.

    Args:
        wrapper: The model that wraps it.
        name: The name of the method.
        settle: Moves weights that have come since.

    Returns:
        A function with the arguments of the method.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with _standing_in(wrapper, settle):
            return getattr(wrapper.template, name)(*args, **kwargs)

    return run


@contextlib.contextmanager
def _standing_in(wrapper: Wrapper, settle: Callable[[], None]) -> Iterator[None]:
    """Inside, the template's steps and files are those of the wrapper.

    They are put into the instance, where Python finds them before the class and Keras
    does not take them for layers.
    """
    template = wrapper.template
    attributes: dict[str, Any] = template.__dict__
    if any(isinstance(attributes.get(name), Redirected) for name in _STEPS):
        yield
        return
    settle()
    names = (*_STEPS, *_FILES)
    before = {name: attributes[name] for name in names if name in attributes}
    jit = template.jit_compile
    functions = {name: getattr(template, name) for name in _FUNCTIONS}
    try:
        for name in names:
            attributes[name] = Redirected(wrapper, name, before.get(name))
        # XLA compiles for one device: towers can be compiled, the step around them cannot.
        template.jit_compile = False
        for name in _FUNCTIONS:
            setattr(template, name, getattr(wrapper, name))
        yield
    finally:
        for name in names:
            attributes.pop(name)
        attributes.update(before)
        for name, function in functions.items():
            setattr(wrapper, name, getattr(template, name))
            setattr(template, name, function)
        template.jit_compile = jit
        for name in _LEFT:
            if name in attributes:
                wrapper.__dict__[name] = attributes[name]
