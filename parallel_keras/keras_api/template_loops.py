"""Loops that the template has made its own: they run on it, and each step on all devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from parallel_keras.steps.overriding import Redirected
from parallel_keras.steps.wrapper import Wrapper

# What a loop does with the model that runs it, and this wrapper does for the template.
_STEPS = ("train_step", "test_step", "predict_step")
_FILES = ("save", "save_weights", "export")
_FUNCTIONS = ("train_function", "test_function", "predict_function")
# What a loop leaves on the model that runs it.
_LEFT = ("history", "stop_training", "stop_evaluating", "stop_predicting")


class TemplateLoops(Wrapper):
    """The part of `DataParallelModel` that has the template run its loops by itself.

    Where a template has a `fit` or `predict` of its own (one that prepares its data, as the
    tasks of KerasHub do), that must not be passed over. So the whole loop is the template's,
    and callbacks see the template; but each step that the loop takes is one of this model,
    on all devices, and so are the files that are written.
    """

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, by the template's own loop if it has one; see `keras.Model.fit`."""
        return self._loop("fit", super().fit)(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates, by the template's own loop if it has one; see `keras.Model.evaluate`."""
        return self._loop("evaluate", super().evaluate)(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts, by the template's own loop if it has one; see `keras.Model.predict`."""
        return self._loop("predict", super().predict)(*args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step, the template's own if it has one; see `keras.Model.train_on_batch`."""
        return self._loop("train_on_batch", super().train_on_batch)(*args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step, the template's own if it has one; see `keras.Model.test_on_batch`."""
        return self._loop("test_on_batch", super().test_on_batch)(*args, **kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step, the template's own if it has one; see `keras.Model.predict_on_batch`."""
        return self._loop("predict_on_batch", super().predict_on_batch)(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes what `fit` calls for each step; see `keras.Model.make_train_function`."""
        return self._loop("make_train_function", super().make_train_function)(force=force)

    def make_test_function(self, force: bool = False) -> Any:
        """Makes what `evaluate` calls for each step; see `keras.Model.make_test_function`."""
        return self._loop("make_test_function", super().make_test_function)(force=force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes what `predict` calls for each batch; see `keras.Model.make_predict_function`."""
        return self._loop("make_predict_function", super().make_predict_function)(force=force)

    def reset_metrics(self) -> None:
        """Starts the metrics anew, as the template does."""
        self._loop("reset_metrics", super().reset_metrics)()

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of the metrics, as the template gives them.

        Returns:
            A dict from names to values.
        """
        return self._loop("get_metrics_result", super().get_metrics_result)()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; one that stops a loop where the loop runs, too.

        Args:
            name: String.
            value: Any.
        """
        super().__setattr__(name, value)
        if name in _LEFT[1:] and self._template_loops:
            setattr(self.template, name, value)

    def _loop(self, name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        """The method of the template if it runs its loops, else the usual one."""
        if not self._template_loops:
            return usual

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._standing_in():
                return getattr(self.template, name)(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Inside, the template's steps and files are those of this model.

        They are put into the instance, where Python finds them before the class and Keras
        does not take them for layers.
        """
        template = self.template
        attributes: dict[str, Any] = template.__dict__
        if any(isinstance(attributes.get(name), Redirected) for name in _STEPS):
            yield
            return
        self._settle()
        names = (*_STEPS, *_FILES)
        before = {name: attributes[name] for name in names if name in attributes}
        jit = template.jit_compile
        functions = {name: getattr(template, name) for name in _FUNCTIONS}
        try:
            for name in names:
                attributes[name] = Redirected(self, name, before.get(name))
            # XLA compiles for one device: towers can be compiled, the step around them cannot.
            template.jit_compile = False
            for name in _FUNCTIONS:
                setattr(template, name, getattr(self, name))
            yield
        finally:
            for name in names:
                attributes.pop(name)
            attributes.update(before)
            for name, function in functions.items():
                setattr(self, name, getattr(template, name))
                setattr(template, name, function)
            template.jit_compile = jit
            for name in _LEFT:
                if name in attributes:
                    self.__dict__[name] = attributes[name]
