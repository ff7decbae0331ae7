"""Keras' loops, as users and callbacks call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallel_keras.keras_api.template_loops import on_template
from parallel_keras.keras_api.worker_loops import Loop
from parallel_keras.steps.wrapper import Wrapper


class Loops(Wrapper):
    """Runs Keras' loops on all workers, each the template's own if that has one.

    It needs the template and the runtime, and gives `fit`, `evaluate`, `predict`, their likes for
    one batch, the functions that they call for each step, and the values of the metrics.
    """

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `keras.Model.fit` does, on all workers.

        Args:
            *args: As in `keras.Model.fit`.
            **kwargs: As in `keras.Model.fit`.

        Returns:
            The `History`, equal on all workers.

        Raises:
            ConnectionError: If another worker, or a server, is gone or does not answer in time.
        """
        return self._loop("fit", super().fit).fit(args, kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as `keras.Model.evaluate` does, on all workers.

        Args:
            *args: As in `keras.Model.evaluate`.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            The loss and the metrics, equal on all workers.

        Raises:
            ConnectionError: If another worker, or a server, is gone or does not answer in time.
        """
        return self._loop("evaluate", super().evaluate).forward(args, kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts as `keras.Model.predict` does, on all workers.

        Args:
            *args: As in `keras.Model.predict`.
            **kwargs: As in `keras.Model.predict`.

        Returns:
            The outputs for all rows, on all workers; for this worker's rows where each
            feeds its own.

        Raises:
            ConnectionError: If another worker, or a server, is gone or does not answer in time.
        """
        with self._steps.predicting.running(kwargs.get("callbacks", args[4:])) as run:
            outputs = self._loop("predict", super().predict).forward(args, kwargs)
        return run.joined(outputs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.train_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.train_on_batch`.
            **kwargs: As in `keras.Model.train_on_batch`.

        Returns:
            The loss and the metrics, equal on all workers.
        """
        return self._loop("train_on_batch", super().train_on_batch).on_batch(args, kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.test_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.test_on_batch`.
            **kwargs: As in `keras.Model.test_on_batch`.

        Returns:
            The loss and the metrics, equal on all workers.
        """
        return self._loop("test_on_batch", super().test_on_batch).on_batch(args, kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.predict_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.predict_on_batch`.
            **kwargs: As in `keras.Model.predict_on_batch`.

        Returns:
            The outputs.
        """
        with self._steps.predicting.running() as run:
            outputs = self._loop("predict_on_batch", super().predict_on_batch).on_batch(
                args, kwargs
            )
        return run.joined(outputs)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        if self._template_loops:
            return self._on_template("make_train_function")(force=force)
        self._runtime.settle()
        if force or self.train_function is None:
            super().make_train_function(force=True)
            self.train_function = self._steps.building(self.train_function, training=True)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the function that `evaluate` calls for each step, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        if self._template_loops:
            return self._on_template("make_test_function")(force=force)
        self._runtime.settle()
        if force or self.test_function is None:
            super().make_test_function(force=True)
            self.test_function = self._steps.building(self.test_function, training=False)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes the function that `predict` calls for each batch, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        if self._template_loops:
            return self._on_template("make_predict_function")(force=force)
        self._runtime.settle()
        if force or self.predict_function is None:
            super().make_predict_function(force=True)
            self.predict_function = self._steps.predict_function(self.predict_function)
        return self.predict_function

    def reset_metrics(self) -> None:
        """Starts the metrics anew, as Keras does at the beginning of an epoch."""
        if self._template_loops:
            self._on_template("reset_metrics")()
        elif self._template_learns:
            self.template.reset_metrics()
        else:
            super().reset_metrics()

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of the metrics, as the template gives them.

        Returns:
            A dict from names to values.
        """
        if self._template_loops:
            return self._on_template("get_metrics_result")()
        if self._template_learns:
            return self.template.get_metrics_result()
        return super().get_metrics_result()

    @property
    def bytes_per_step(self) -> int | None:
        """The bytes that this worker sends in a training step; `None` before the first one."""
        cluster = self._runtime.cluster
        return 0 if cluster is None else cluster.traffic.get("train")

    def _loop(self, name: str, usual: Callable[..., Any]) -> Loop:
        """A loop: the template's own if it has one, else the usual one."""
        run = self._on_template(name) if self._template_loops else usual
        return Loop(self, self._runtime, name, run)

    def _on_template(self, name: str) -> Callable[..., Any]:
        return on_template(self, name, self._runtime.settle)
