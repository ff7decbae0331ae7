"""What a model makes of its rows: it is asked on a few random ones, where a graph leaves doubt."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.graphs.graph import calling
from parallel_keras.nests import flatten_with_paths
from parallel_keras.towers import left_behind
from parallel_keras.towers.call import takes_training
from parallel_keras.towers.trial import TRIED, Trial, close, in_any_order, is_mean, near

# For each output what joins those of parts of the batch: "rows", "same", "mean", "sum", "max",
# "min"; "mixed" if nothing does, "unknown" if it could not be found out.
Answers = list[str]
_KNOWN: weakref.WeakKeyDictionary[keras.Model, dict[Any, Answers]] = weakref.WeakKeyDictionary()


def answers(template: keras.Model, call: tuple[Any, ...], training: Any) -> Answers:
    """How the outputs of parts of a batch become those of the batch.

    Layers that draw random numbers or normalise rows are called as if not trained: what they do to
    rows is known, and would hide what the others do.

    Args:
        template: The model. Nothing of it is changed.
        call: What it is called with: positional and keyword arguments, a `tf.TensorSpec` for
            each tensor.
        training: Bool or `None`, the argument of that name.

    Returns:
        An answer for each leaf of the outputs; empty if nothing could be found out.
    """
    key = (repr(call), training)
    known = _KNOWN.setdefault(template, {})
    if key not in known:
        try:
            with (
                tf.init_scope(),
                left_behind.noting(_compat.all_layers(template)),
                _not_trained(template),
            ):
                known[key] = _asked(Trial(template, call), training)
        except Exception:  # noqa: BLE001 (a model that cannot be tried may fail in any way)
            known[key] = []
    return known[key]


@contextlib.contextmanager
def _not_trained(template: keras.Model) -> Iterator[None]:
    """Inside, layers that draw or normalise are called with `training=False`."""

    def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **{**kwargs, "training": False})

    with contextlib.ExitStack() as stack:
        for layer in _compat.all_layers(template):
            if layer is not template and _by_chance(layer) and takes_training(layer):
                stack.enter_context(calling(layer, functools.partial(quietly, layer.call)))
        yield


def _by_chance(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) or any(
        isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values()
    )


def _asked(trial: Trial, training: Any) -> Answers:
    seen = {groups: _leaves(trial.outputs(groups, training)) for groups in TRIED}
    other = _leaves(trial.outputs("a", training, shift=1))
    columns = zip(other, *seen.values(), strict=True)
    return [_judge(dict(zip(TRIED, column, strict=True)), again) for again, *column in columns]


def _leaves(outputs: Any) -> list[Any]:
    """Arrays of the numbers that were returned, `None` for what is none."""
    leaves = [leaf for _, leaf in flatten_with_paths(outputs)]
    return [np.asarray(leaf) if _is_number(leaf) else None for leaf in leaves]


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, tf.Tensor):
        return bool(leaf.dtype != tf.string)
    return isinstance(leaf, (int, float))


def _judge(seen: dict[str, Any], again: Any) -> str:
    if again is None or any(not np.isfinite(value).all() for value in seen.values()):
        return "unknown"
    if seen["a"].shape != again.shape or not near(seen["a"], again):
        return "unknown"  # It is random.
    if all(value.shape == again.shape and near(value, again) for value in seen.values()):
        return "same"
    return _rows(seen) if again.ndim else _scalar(seen)


def _rows(seen: dict[str, Any]) -> str:
    if len({value.shape[1:] for value in seen.values()}) > 1:
        return "mixed"
    joined = {"a" + group: np.concatenate([seen["a"], seen[group]]) for group in "bc"}
    same = [
        seen[key].shape == value.shape and near(seen[key], value) for key, value in joined.items()
    ]
    return "rows" if all(same) else "mixed"


def _scalar(seen: dict[str, Any]) -> str:
    if not in_any_order(seen):
        return "mixed"
    if is_mean(seen):
        return "mean"
    rules = {"sum": np.add, "max": np.maximum, "min": np.minimum}
    for rule, join in rules.items():
        if all(close(seen["a" + group], join(seen["a"], seen[group]), seen) for group in "bc"):
            return rule
    return "mixed"
