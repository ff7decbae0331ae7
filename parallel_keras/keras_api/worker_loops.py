"""`fit`, `evaluate` and `predict` of one worker among several."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras

from parallel_keras.keras_api.backups import torn_backups
from parallel_keras.steps import checks
from parallel_keras.steps.first_batch import first_batch
from parallel_keras.steps.wrapper import Wrapper
from parallel_keras.workers import servers
from parallel_keras.workers.agreement import Agreement, agree_on_seed, agree_on_state
from parallel_keras.workers.own_rows import Feed

# They write one file for the whole run. Only the chief may; what BackupAndRestore
# restores there reaches the others.
_WRITERS = (keras.callbacks.BackupAndRestore, keras.callbacks.CSVLogger)


class WorkerLoops(Wrapper):
    """The part of `DataParallelModel` that runs Keras' loops after workers agreed on a start."""

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
        if self._cluster is None:
            callbacks = kwargs.get("callbacks")
            if torn := torn_backups(callbacks):
                kwargs["callbacks"] = [*keras.tree.flatten(callbacks), *torn]
            with servers.naming_faults():
                return super().fit(*args, **kwargs)
        arguments = self._by_name(super().fit, args, kwargs)
        if self._cluster.feeds_own_rows:
            feed = Feed(self._cluster)
            feed.training(arguments)
            feed.validation(arguments)
        else:
            agree_on_seed(self._cluster, first=not self._agreed)
        return self._run(super().fit, arguments)

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
        # In `fit`, Keras evaluates what was prepared when it started.
        if self._cluster is None or "_use_cached_eval_dataset" in kwargs:
            with servers.naming_faults():
                return super().evaluate(*args, **kwargs)
        arguments = self._by_name(super().evaluate, args, kwargs)
        if self._cluster.feeds_own_rows:
            Feed(self._cluster).evaluation(arguments)
        return self._run(super().evaluate, arguments)

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
        if self._cluster is None:
            with servers.naming_faults():
                return super().predict(*args, **kwargs)
        arguments = self._by_name(super().predict, args, kwargs)
        if self._cluster.feeds_own_rows:
            Feed(self._cluster).evaluation(arguments)
        return self._run(super().predict, arguments)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.train_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.train_on_batch`.
            **kwargs: As in `keras.Model.train_on_batch`.

        Returns:
            The loss and the metrics, equal on all workers.
        """
        return self._on_batch(super().train_on_batch, *args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.test_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.test_on_batch`.
            **kwargs: As in `keras.Model.test_on_batch`.

        Returns:
            The loss and the metrics, equal on all workers.
        """
        return self._on_batch(super().test_on_batch, *args, **kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """One step as `keras.Model.predict_on_batch` does, on all workers.

        Args:
            *args: As in `keras.Model.predict_on_batch`.
            **kwargs: As in `keras.Model.predict_on_batch`.

        Returns:
            The outputs.
        """
        return self._on_batch(super().predict_on_batch, *args, **kwargs)

    @property
    def bytes_per_step(self) -> int | None:
        """The bytes that this worker sends in a training step; `None` before the first one."""
        return 0 if self._cluster is None else self._cluster.traffic.get("train")

    def _run(self, loop: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        cluster = self._cluster
        if cluster is None:
            return loop(**arguments)
        arguments.update(self._build_from(arguments))
        if self._takes_callbacks(loop.__name__):
            given = arguments.get("callbacks")
            arguments["callbacks"] = _with_agreement(given, Agreement(cluster, self))
        else:
            agree_on_state(self, cluster)
        if not cluster.chief and "verbose" in arguments and arguments["verbose"] == "auto":
            arguments["verbose"] = 0
        self._agreed = True
        with cluster.naming_faults():
            return loop(**arguments)

    def _build_from(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Makes the template's weights, if it has none, before anything is traced.

        Args:
            arguments: Those of a loop, by name.

        Returns:
            Those that are used up, anew.
        """
        if self.template.built:
            return {}
        data = arguments.get("x")
        # What a loop of its own makes of its data is not known.
        if not self._template_loops:
            inputs, data = first_batch(data)
            if inputs is not None:
                self._build_template((inputs,), {})
        checks.check_built(self.template)
        return {"x": data}

    def _by_name(
        self, loop: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments by name, as Keras' loop names them, or the template's own."""
        signature = self._signature(loop.__name__)
        given = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        return given

    def _takes_callbacks(self, loop: str) -> bool:
        parameters = self._signature(loop).parameters
        return "callbacks" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def _signature(self, loop: str) -> inspect.Signature:
        """That of a loop, the template's own if it has one."""
        if self._template_loops:
            return inspect.signature(getattr(self.template, loop))
        signature = inspect.signature(getattr(keras.Model, loop))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def _on_batch(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cluster = self._cluster
        if cluster is None:
            with servers.naming_faults():
                return step(*args, **kwargs)
        self._build_from({"x": args[0] if args else kwargs.get("x")})
        if not self._agreed:
            agree_on_state(self, cluster)
            self._agreed = True
        with cluster.naming_faults():
            return step(*args, **kwargs)


def _with_agreement(callbacks: Any, agreement: Agreement) -> Any:
    """The callbacks that this worker runs, the agreement after all that restore something."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        given = callbacks.callbacks
        given[:] = [one for one in given if agreement.chief or not isinstance(one, _WRITERS)]
        for one in (*torn_backups(given), agreement):
            callbacks.append(one)
        return callbacks
    given = [] if callbacks is None else keras.tree.flatten(callbacks)
    kept = [one for one in given if agreement.chief or not isinstance(one, _WRITERS)]
    return [*kept, *torn_backups(kept), agreement]
