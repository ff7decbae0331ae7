"""Answers "are these the numbers of one device?" for a user's own model."""

from __future__ import annotations

from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.explaining.batches import first_of
from parallel_keras.model import DataParallelModel
from parallel_keras.verifying import findings
from parallel_keras.verifying.findings import REMEDIES, Difference, Verification
from parallel_keras.verifying.layers import first_difference, relative
from parallel_keras.verifying.model_state import ModelState
from parallel_keras.verifying.runs import (
    Data,
    Numbers,
    in_order,
    permuted,
    run_steps,
    traced_anew,
    without_chance,
)

# What rounding explains in one step of a shallow net, relative to the largest value: design of the
# parity tests. Deep nets are measured, see `_noise`.
_ALLOWED: Final = {"float64": 1e-9, "float32": 1e-5}
_ALLOWED_HALF: Final = 2e-2
# Sums are taken in another order by other devices, too; this many times what one other order does.
_SAFETY: Final = 20.0
# Noise above this is more than the rounding of a few sums.
_AMPLIFIED: Final = 1e-5
_TRAIN: Final = "train: "
# How often the noise of a net that amplifies it is measured.
_SAMPLES: Final = 3
# Noise above this is no rounding of a sum: then the order of the rows itself may matter.
_LARGEST_NOISE: Final = 1e-3
# A number that one rounding of the weights moves by so much of itself is what cancels to zero, such
# as the gradient of a bias before a normalisation: any other value is as good.
_ROUNDING_ALONE: Final = 0.1


def verify(parallel: DataParallelModel, batch: Any) -> Verification:
    """Compares a step of your own model on all devices with the same step on one.

    It runs one training step, one evaluation and one prediction, on one device and on all,
    from the same state, and compares everything they gave: the loss, every metric, every
    gradient, every variable that was assigned, the outputs. What differs is named, with the
    first layer whose output differs and what to do. Layers that drop or add noise at a rate
    are silenced meanwhile. Afterwards the model is what it was before.

    Args:
        parallel: `DataParallelModel`, compiled, on two or more devices.
        batch: One batch as `fit` would get it: a tuple `(x, y)` or `(x, y, sample_weight)` of
            nests of arrays or tensors of shape `(batch_size, ...)`. Or a batched
            `tf.data.Dataset` or a `keras.utils.PyDataset`: then the first batch is taken.
            A number of rows that the devices do not divide shows most.

    Returns:
        A `Verification`, which prints as a table.

    Raises:
        TypeError: If `parallel` is not a `DataParallelModel`.
        ValueError: If it is not compiled.

    Example:
    >>> import parallel_keras as pk
    >>> template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> parallel = pk.DataParallelModel(template, 3)
    >>> parallel.compile(optimizer="adam", loss="mse")
    >>> rows = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    >>> pk.verify(parallel, (rows[:, :3], rows[:, 3:])).equal
    True
    """
    _check(parallel)
    data = first_of(batch)
    template = parallel.template
    if not parallel.built:
        template(data[0])
    notes: list[str] = []
    with without_chance(template) as (silenced, left), traced_anew([parallel, template]):
        state = ModelState(parallel, template)
        try:
            with state.noting_gradients():
                bare = _on_one_device(parallel, data, state)
                ours = _on_all_devices(parallel, data, state)
                noise = _noise(parallel, data, state, bare)
            state.restore()
            if isinstance(ours, Difference):
                differences: tuple[Difference, ...] = (ours,)
                compared = len(bare)
            else:
                found = _compared(bare, ours, noise, _floor(template))
                where = _where(parallel, data[0], found, noise)
                kept = state.kept()
                differences = tuple(_explained(name, found, where, kept) for name in found)
                chance = [name for name, size in noise.items() if size == float("inf")]
                compared = len(bare.keys() | ours.keys()) - len(chance)
                if chance:
                    notes.append(
                        f"{len(chance)} numbers were not compared, such as {chance[0]!r}: on one "
                        "device, too, they are others once the weights are off by one rounding."
                    )
        finally:
            state.restore()
    if silenced:
        notes.append(f"{', '.join(silenced)}: the rates were 0 for the comparison.")
    if left:
        names = ", ".join(layer.name for layer in left)
        notes.append(f"{names}: draws random numbers, on each device others.")
    return Verification(
        equal=not differences,
        differences=differences,
        compared=compared,
        devices=tuple(parallel.devices),
        rows=_rows(data),
        notes=tuple(notes),
    )


def _on_one_device(parallel: DataParallelModel, data: Data, state: ModelState) -> Numbers:
    """The bare template, or a subclass with steps of its own on one device."""
    with tf.device(parallel.devices[0]):
        return run_steps(parallel.template, data, state)


def _on_all_devices(
    parallel: DataParallelModel, data: Data, state: ModelState
) -> Numbers | Difference:
    """The same on all devices; what does not run there, although it did on one, is a finding."""
    try:
        return run_steps(parallel, data, state)
    except Exception as error:  # noqa: BLE001 (whatever is raised is what the user asks about)
        remedy = f"{type(error).__name__}: {error}"
        size = float("inf")
        return Difference("a step on all devices", "", size, 0.0, findings.REFUSED, remedy)


def _noise(
    parallel: DataParallelModel, data: Data, state: ModelState, bare: Numbers
) -> dict[str, float]:
    """How far rounding alone moves each number: the bare model on its rows in other orders.

    A deep net amplifies rounding, so that few orders tell little: there it is also the bare model
    on weights that are off by one rounding. That alone counts where another order does so much
    that the order itself may matter to the model.
    """

    def by_order(seed: int) -> Numbers:
        order = np.random.default_rng(seed).permutation(_rows(data))
        return in_order(_on_one_device(parallel, permuted(data, order), state), order)

    def by_rounding(seed: int) -> Numbers:
        with state.perturbed(seed):
            return _on_one_device(parallel, data, state)

    def largest(others: list[Numbers]) -> dict[str, float]:
        return {
            name: max(relative(value, other.get(name, value)) for other in others)
            for name, value in bare.items()
        }

    first = by_order(0)
    noise = largest([first])
    if max(noise.values(), default=0.0) > _AMPLIFIED:
        rounding = largest([by_rounding(seed) for seed in range(_SAMPLES)])
        orders = largest([first, *(by_order(seed) for seed in range(1, _SAMPLES))])
        for name, size in rounding.items():
            noise[name] = size if orders[name] > _LARGEST_NOISE else max(size, orders[name])
    # What amplifies the rounding of one gradient does so to all that pass through it, and to what
    # each of them adds to its weight.
    known = {name: size for name, size in noise.items() if size < _ROUNDING_ALONE}
    usual = {step: _usual(known, step) for step in ("train: gradient", "evaluate", "predict")}
    start = state.start()
    for name, value in bare.items():
        if name not in known:
            noise[name] = float("inf")
            continue
        moved = (
            relative(value, start[name.removeprefix(_TRAIN)])
            if name.removeprefix(_TRAIN) in start
            else 0.0
        )
        of_step = [size for step, size in usual.items() if name.startswith(step)]
        noise[name] = max(noise[name], *of_step, 0.0)
        if name.startswith(_TRAIN):
            noise[name] = max(noise[name], moved * usual["train: gradient"])
    return noise


def _usual(noise: dict[str, float], beginning: str) -> float:
    """What nine of ten numbers stay below: rounding that is amplified has a long tail."""
    found = [size for name, size in noise.items() if name.startswith(beginning)]
    return float(np.quantile(found, 0.9)) if found else 0.0


def _compared(
    bare: Numbers, ours: Numbers, noise: dict[str, float], floor: float
) -> dict[str, tuple[float, float]]:
    """The size of each difference and what was allowed, for those that are too large."""
    found = {}
    for name in [*bare, *(name for name in ours if name not in bare)]:
        one, other = bare.get(name), ours.get(name)
        size = float("inf") if one is None or other is None else relative(one, other)
        allowed = max(floor, _SAFETY * noise.get(name, 0.0))
        if size > allowed:
            found[name] = (size, allowed)
    return found


def _where(
    parallel: DataParallelModel, x: Any, found: dict[str, Any], noise: dict[str, float]
) -> dict[bool, tuple[str, str]]:
    """For training and not, the first layer whose output differs, and the likely kind."""
    where = {}
    for training, steps in ((True, ("train",)), (False, ("evaluate", "predict"))):
        if any(name.startswith(steps) for name in found):
            outputs = [size for name, size in noise.items() if name.startswith("predict: output")]
            allowed = max(_floor(parallel.template), _SAFETY * max(outputs, default=0.0))
            layer = first_difference(parallel.template, x, parallel.num_towers, training, allowed)
            if layer is not None:
                where[training] = layer
    return where


def _explained(
    name: str,
    found: dict[str, tuple[float, float]],
    where: dict[bool, tuple[str, str]],
    kept: set[str],
) -> Difference:
    layer, kind = where.get(name.startswith("train"), ("", ""))
    kind = kind or _kind(name, found, kept)
    return Difference(name, layer, *found[name], kind, REMEDIES[kind])


def _kind(name: str, found: dict[str, Any], kept: set[str]) -> str:
    """The likely kind of a difference where the output of no layer differs."""
    step, _, variable = name.partition(": ")
    if "(tf.Variable)" in variable:
        return findings.OUTSIDE
    if variable in kept:
        return findings.STATE
    # A loss that differs has other gradients, and those other weights.
    return findings.LOSS if f"{step}: loss" in found else findings.UNKNOWN


def _floor(template: keras.Model) -> float:
    dtypes = {layer.compute_dtype for layer in _compat.all_layers(template)}
    return max((_ALLOWED.get(str(dtype), _ALLOWED_HALF) for dtype in dtypes), default=1e-5)


def _rows(data: Data) -> int:
    leaves = [leaf for leaf in tf.nest.flatten(data) if tf.is_tensor(leaf) and leaf.shape.rank]
    first = leaves[0]
    return int(first.nrows() if isinstance(first, tf.RaggedTensor) else first.shape[0])


def _check(parallel: Any) -> None:
    if not isinstance(parallel, DataParallelModel):
        raise TypeError(
            "Expected `parallel` to be a DataParallelModel. "
            f"Received: parallel={parallel!r} (of type {type(parallel).__name__}). "
            "Wrap the model: verify(DataParallelModel(model), batch)."
        )
    if not parallel.compiled:
        raise ValueError(
            "Only a compiled model has steps to compare. "
            f"Received: parallel.compiled={parallel.compiled}. "
            'Call parallel.compile(optimizer="adam", loss=...) first.'
        )
