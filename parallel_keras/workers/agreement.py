"""What workers agree on before they train: one model, one library, one start, one order of rows."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras._version import __version__

if TYPE_CHECKING:
    from parallel_keras.workers.connection import Workers


def check_same(workers: Workers, facts: dict[str, Any]) -> None:
    """Compares facts with those of the first worker.

    Args:
        workers: The `Workers`.
        facts: Dict from what a fact is called to its value.

    Raises:
        ValueError: On all workers, naming one that differs and in what.
    """
    text = json.dumps({name: str(value) for name, value in facts.items()})
    told = tf.io.decode_raw(tf.constant(text), tf.uint8)
    with workers.naming_faults():
        answers = workers.gather([told], "start")
    heard = [json.loads(bytes(answer.numpy())) for (answer,) in answers]
    for task, theirs in zip(workers.cluster.tasks, heard, strict=True):
        for name, expected in heard[0].items():
            if theirs.get(name) != expected:
                raise ValueError(
                    f"The workers do not train the same: {task} has another {name}. Expected, as "
                    f"on {workers.cluster.tasks[0]}: {expected}. Received: {theirs.get(name)}. "
                    "Start the same script, with the same versions, on all workers."
                )


def facts_of(model: Any) -> dict[str, Any]:
    """What must be the same on all workers.

    Args:
        model: The `DataParallelModel`.

    Returns:
        A dict from what a fact is called to its value.
    """
    template = model.template
    shapes = [(tuple(v.shape), str(v.dtype)) for v in template.variables]
    return {
        "version of Keras": keras.__version__,
        "version of TensorFlow": tf.__version__,
        "version of parallel_keras": __version__,
        "template": f"{type(template).__name__} with variables {shapes}, {_digest(template)}",
        "loss_on": model.loss_on,
        "rules": sorted(model.request["rules"].items()),
    }


def _digest(template: keras.Model) -> str:
    """A short name for the template's configuration, without the names that Keras counts up."""
    try:
        config = template.get_config()
    except NotImplementedError:
        return "no configuration"
    text = json.dumps(_without_names(config), default=lambda value: type(value).__name__)
    return f"configuration {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _without_names(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            str(key): _without_names(value)
            for key, value in config.items()
            if key not in ("name", "build_config", "keras_history", "input_layers", "output_layers")
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(value) for value in config]
    return config


def spread(workers: Workers, variables: list[keras.Variable]) -> None:
    """Gives all workers the first worker's values.

    Args:
        workers: The `Workers`.
        variables: The same variables on all workers.
    """
    values = [tf.convert_to_tensor(variable.value) for variable in variables]
    for variable, value in zip(variables, workers.from_chief(values), strict=True):
        variable.assign(value)


def agree_on_state(model: Any, workers: Workers) -> None:
    """Gives all workers the first one's weights, optimizer state and next epoch.

    Args:
        model: The `DataParallelModel`, whose template is built.
        workers: The `Workers`.
    """
    optimizer = model.optimizer if model.compiled else None
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    variables = [*model.template.variables, *([] if optimizer is None else optimizer.variables)]
    facts = facts_of(model)
    facts["optimizer"] = f"{type(optimizer).__name__} of {len(variables)} variables"
    check_same(workers, facts)
    with workers.naming_faults():
        spread(workers, variables)
        epoch = tf.constant(_compat.get_initial_epoch(model) or 0)
        chiefs = int(workers.from_chief([epoch])[0])
    _compat.set_initial_epoch(model, chiefs or None)


def agree_on_seed(workers: Workers, *, first: bool) -> None:
    """Has all workers draw the same random numbers, and so shuffle rows in the same order.

    Seeds that the user has set alike on all workers stay; then the first `fit` draws
    what one device draws.

    Args:
        workers: The `Workers`.
        first: Whether nothing was agreed on before.
    """
    global_seed, _ = tf.compat.v1.get_seed(0)
    # Keras and its data adapters draw from NumPy's old generator.
    states = (global_seed, random.getstate(), repr(np.random.get_state()))  # noqa: NPY002
    digest = hashlib.sha256(repr(states).encode()).digest()[:4]
    told = tf.constant(int.from_bytes(digest, "big"), tf.int64)
    with workers.naming_faults():
        heard = [int(number) for (number,) in workers.gather([told], "start")]
        if first and len(set(heard)) == 1:
            tf.random.set_seed(global_seed)
            return
        seed = tf.constant(random.randrange(2**31), tf.int64)  # noqa: S311 (order, no secrets)
        keras.utils.set_random_seed(int(workers.from_chief([seed])[0]))


class Agreement(keras.callbacks.Callback):
    """Runs `agree_on_state` when a loop begins, after callbacks that restore a state.

    Templates without weights have nothing to agree on yet; they do when they get some.

    Args:
        workers: The `Workers`.
        wrapper: The `DataParallelModel`. The loop may be that of its template.
    """

    def __init__(self, workers: Workers, wrapper: Any) -> None:
        super().__init__()
        self._workers, self._wrapper = workers, wrapper
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """All start from the first worker's state."""
        del logs
        self._agree()
        self._training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """All evaluate the first worker's weights."""
        del logs
        self._agree()

    def on_predict_begin(self, logs: Any = None) -> None:
        """All predict with the first worker's weights."""
        del logs
        self._agree()

    def _agree(self) -> None:
        # While they train together, weights are the same all the time.
        if not self._training and self._wrapper.template.built:
            epoch = _compat.get_initial_epoch(self.model)
            _compat.set_initial_epoch(self._wrapper, epoch)
            agree_on_state(self._wrapper, self._workers)
            _compat.set_initial_epoch(self.model, _compat.get_initial_epoch(self._wrapper))

    @property
    def chief(self) -> bool:
        """Whether this worker writes the files of all."""
        return self._workers.chief
