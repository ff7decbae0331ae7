"""What a program is, and what is compared of a run of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import parallel_keras as pk
from tests.parity import ATOL, RTOL, rng, rows

TOWERS = 3
# Batches of 5 and 2 rows: towers of 2, 2 and 1 rows, then a batch with fewer rows than towers.
ROWS, BATCH = 7, 5


@dataclasses.dataclass
class Program:
    """A compiled model, what it is trained on, and how.

    Attributes:
        model: The model.
        x: What `fit`, `evaluate` and `predict` take.
        y: Targets.
        asked: What to predict instead of `x`.
        batch_size: `None` where `x` is a dataset.
        epochs: Number of epochs.
        fit: Further arguments of `fit`.
        rules: Of the wrapper.
        train: A loop of the program's own, in place of `fit`; it returns what it measured.
        skip: Which of `"evaluate"` and `"predict"` the bare model does not have.
        rtol: Relative tolerance.
    """

    model: keras.Model
    x: Any
    y: Any = None
    asked: Any = None
    batch_size: int | None = BATCH
    epochs: int = 2
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    rules: dict[str, str] | None = None
    train: Callable[[keras.Model, Program], dict[str, Any]] | None = None
    skip: tuple[str, ...] = ()
    rtol: float = RTOL


Make = Callable[[], Program]


@dataclasses.dataclass
class Run:
    """The numbers of one run."""

    history: dict[str, Any]
    evaluated: dict[str, Any]
    predicted: Any
    variables: list[tuple[str, np.ndarray]]
    program: Program


def run(make: Make, towers: int | None = None) -> Run:
    """Makes a program and runs it, bare or on several devices."""
    keras.utils.set_random_seed(7)
    program = make()
    template = model = program.model
    before = [np.array(v) for v in template.trainable_variables]
    if towers is not None:
        model = pk.DataParallelModel(template, towers, rules=program.rules)
    keras.utils.set_random_seed(11)
    if program.train is not None:
        history = program.train(model, program)
    else:
        history = model.fit(
            program.x,
            program.y,
            batch_size=program.batch_size,
            epochs=program.epochs,
            shuffle=False,
            verbose=0,
            **program.fit,
        ).history
    if before:  # else the weights were made by the first batch
        after = template.trainable_variables
        assert any(not np.array_equal(*two) for two in zip(before, after, strict=True))
    evaluated = predicted = {}
    if "evaluate" not in program.skip:
        evaluated = model.evaluate(
            program.x, program.y, batch_size=program.batch_size, verbose=0, return_dict=True
        )
    if "predict" not in program.skip:
        asked = program.x if program.asked is None else program.asked
        predicted = model.predict(asked, batch_size=program.batch_size, verbose=0)
    return Run(history, evaluated, predicted, variables_of(template), program)


def variables_of(model: keras.Model) -> list[tuple[str, np.ndarray]]:
    """All weights and state of a model, and those of each optimizer that it holds."""
    found = list(model.variables)
    for value in vars(model).values():
        if isinstance(value, keras.optimizers.Optimizer):
            found += value.variables
    unique = {id(variable): variable for variable in found}.values()
    return [(v.path, v.numpy()) for v in unique]


def assert_same(expected: Run, actual: Run) -> None:
    """Compares all numbers of two runs."""
    rtol = expected.program.rtol
    for name in ("history", "evaluated"):
        one, other = getattr(expected, name), getattr(actual, name)
        assert list(one) == list(other), name
        for key, value in one.items():
            assert np.all(np.isfinite(value)), key
            np.testing.assert_allclose(
                other[key], value, rtol=rtol, atol=ATOL, err_msg=f"{name} {key}"
            )
    assert len(expected.variables) == len(actual.variables)
    for (path, one), (_, other) in zip(expected.variables, actual.variables, strict=True):
        if one.dtype.kind in "iufb":
            np.testing.assert_allclose(other, one, rtol=rtol, atol=ATOL * scale(one), err_msg=path)
        else:
            np.testing.assert_array_equal(other, one, err_msg=path)
    keras.tree.assert_same_structure(expected.predicted, actual.predicted)
    for one, other in zip(
        keras.tree.flatten(expected.predicted), keras.tree.flatten(actual.predicted), strict=True
    ):
        assert np.shape(one) == np.shape(other)
        np.testing.assert_allclose(other, one, rtol=rtol, atol=ATOL * scale(one), err_msg="predict")


def scale(numbers: np.ndarray) -> float:
    """The size of some numbers: cancelled digits are relative to it."""
    return max(1.0, float(np.abs(numbers).max(initial=0)))


def adam(rate: float = 1e-2) -> keras.optimizers.Optimizer:
    """Adam that does not blow up rounding.

    Some gradients are zero but for rounding (the bias of keys in attention, a bias before
    normalisation). With Adam's default epsilon they become steps of any size and sign, on one
    device as on several.
    """
    return keras.optimizers.Adam(rate, epsilon=1e-4)


def tokens(*shape: int, count: int = 20, lowest: int = 1, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return rng(seed).integers(lowest, count, shape).astype("int32")


def padded(*shape: int, count: int = 20, seed: int = 0) -> np.ndarray:
    """Token ids with another number of zeros at the end of each row."""
    ids = tokens(*shape, count=count, seed=seed)
    lengths = rng(seed + 1).integers(2, shape[-1] + 1, shape[0])
    return ids * (np.arange(shape[-1]) < lengths[:, None])


def images(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random images in [0, 1]."""
    return rng(seed).random((count, size, size, channels)).astype("float32")


def classes(count: int, among: int, seed: int = 5) -> np.ndarray:
    """Random class ids."""
    return rng(seed).integers(0, among, count).astype("int32")


__all__ = [
    "BATCH",
    "ROWS",
    "TOWERS",
    "Make",
    "Program",
    "Run",
    "adam",
    "assert_same",
    "classes",
    "images",
    "padded",
    "rng",
    "rows",
    "run",
    "tokens",
]
