"""`fit`, `evaluate` and `predict` of one worker among several, and with servers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from parallel_keras.keras_api.backups import torn_backups
from parallel_keras.steps import checks
from parallel_keras.steps.first_batch import first_batch
from parallel_keras.steps.overriding import overridden_loops
from parallel_keras.workers import servers
from parallel_keras.workers.agreement import Agreement, agree_on_seed, agree_on_state
from parallel_keras.workers.own_rows import Feed

if TYPE_CHECKING:
    from parallel_keras.steps.runtime import Runtime
    from parallel_keras.workers.connection import Workers

# They write one file for the whole run. Only the chief may; what BackupAndRestore
# restores there reaches the others.
_WRITERS = (keras.callbacks.BackupAndRestore, keras.callbacks.CSVLogger)


class Loop:
    """One of Keras' loops, on all workers after they agreed on a start.

    Args:
        model: The `DataParallelModel`.
        runtime: What it runs on.
        name: The name of the loop.
        run: Runs it on this worker: Keras' loop, or the template's own.
    """

    def __init__(self, model: Any, runtime: Runtime, name: str, run: Callable[..., Any]) -> None:
        self._model, self._runtime, self._name, self._run = model, runtime, name, run

    def fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `fit` with these arguments."""
        cluster = self._runtime.cluster
        if cluster is None:
            callbacks = kwargs.get("callbacks")
            if torn := torn_backups(callbacks):
                kwargs["callbacks"] = [*keras.tree.flatten(callbacks), *torn]
            return self._here(args, kwargs)
        arguments = self._by_name(args, kwargs)
        if cluster.feeds_own_rows:
            feed = Feed(cluster)
            feed.training(arguments)
            feed.validation(arguments)
        else:
            agree_on_seed(cluster, first=not self._runtime.agreed)
        return self._on_all(cluster, arguments)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `evaluate` or `predict` with these arguments."""
        cluster = self._runtime.cluster
        # In `fit`, Keras evaluates what was prepared when it started.
        if cluster is None or "_use_cached_eval_dataset" in kwargs:
            return self._here(args, kwargs)
        arguments = self._by_name(args, kwargs)
        if cluster.feeds_own_rows:
            Feed(cluster).evaluation(arguments)
        return self._on_all(cluster, arguments)

    def on_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `train_on_batch` or one like it with these arguments."""
        cluster = self._runtime.cluster
        if cluster is None:
            return self._here(args, kwargs)
        self._build_from({"x": args[0] if args else kwargs.get("x")})
        if not self._runtime.agreed:
            agree_on_state(self._model, cluster)
            self._runtime.agreed = True
        with cluster.naming_faults():
            return self._run(*args, **kwargs)

    def _here(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with servers.naming_faults():
            return self._run(*args, **kwargs)

    def _on_all(self, cluster: Workers, arguments: dict[str, Any]) -> Any:
        arguments.update(self._build_from(arguments))
        if self._takes_callbacks():
            given = arguments.get("callbacks")
            arguments["callbacks"] = _with_agreement(given, Agreement(cluster, self._model))
        else:
            agree_on_state(self._model, cluster)
        if not cluster.chief and "verbose" in arguments and arguments["verbose"] == "auto":
            arguments["verbose"] = 0
        self._runtime.agreed = True
        with cluster.naming_faults():
            return self._run(**arguments)

    def _build_from(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Makes the template's weights, if it has none, before anything is traced.

        Args:
            arguments: Those of a loop, by name.

        Returns:
            Those that are used up, anew.
        """
        template = self._model.template
        if template.built:
            return {}
        data = arguments.get("x")
        # What a loop of its own makes of its data is not known.
        if not overridden_loops(template):
            inputs, data = first_batch(data)
            if inputs is not None:
                self._runtime.build((inputs,), {})
        checks.check_built(template)
        return {"x": data}

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, as Keras' loop names them, or the template's own."""
        signature = self._signature()
        given = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        return given

    def _takes_callbacks(self) -> bool:
        parameters = self._signature().parameters
        return "callbacks" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def _signature(self) -> inspect.Signature:
        """That of the loop, the template's own if it has one."""
        if overridden_loops(self._model.template):
            return inspect.signature(getattr(self._model.template, self._name))
        signature = inspect.signature(getattr(keras.Model, self._name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


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
