"""Answers "why is it not faster?" by timing the pieces of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import keras

from parallel_keras.explaining import stopwatch
from parallel_keras.explaining.batches import read
from parallel_keras.explaining.explanation import Explanation
from parallel_keras.explaining.pieces import Data, Pieces
from parallel_keras.explaining.step_times import TowerTimes
from parallel_keras.explaining.traffic import traffic
from parallel_keras.homes.links import is_gpu
from parallel_keras.homes.plan import size_of
from parallel_keras.model import DataParallelModel
from parallel_keras.steps.overriding import LEARNING, overrides
from parallel_keras.towers import losses


def explain(parallel: DataParallelModel, batch: Any, *, repeats: int = 20) -> Explanation:
    """Says where the time of a training step goes, and what would make it faster.

    It runs the step and its pieces a few times each and takes the shortest times. Weights,
    optimizer and metrics are afterwards what they were before.

    Args:
        parallel: `DataParallelModel`, compiled.
        batch: One batch as `fit` would get it: a tuple `(x, y)` or `(x, y, sample_weight)` of
            nests of arrays or tensors of shape `(batch_size, ...)`. Or a batched
            `tf.data.Dataset` or a `keras.utils.PyDataset`: then the first batch is taken, and the
            time to read one is measured too.
        repeats: Int, how often each piece is timed, at least 1. Defaults to `20`.

    Returns:
        An `Explanation`, which prints as a table.

    Raises:
        TypeError: If `parallel` is not a `DataParallelModel`.
        ValueError: If it is not compiled or has a training step of its own, or if an argument
            does not fit.

    Example:
    >>> import numpy as np
    >>> import parallel_keras as pk
    >>> template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> parallel = pk.DataParallelModel(template, 2)
    >>> parallel.compile(optimizer="sgd", loss="mse")
    >>> explanation = pk.explain(parallel, (np.ones((4, 3)), np.ones((4, 2))))
    >>> [tower.rows for tower in explanation.towers]
    [2, 2]
    >>> explanation.loss_on
    'towers'
    """
    _check(parallel, repeats)
    data, reading = read(batch, repeats)
    if not parallel.built:
        parallel(data[0])
    with _unchanged(parallel):
        parallel.train_on_batch(*data)  # makes the variables of metrics and of the optimizer
        return _measure(parallel, data, reading, repeats)


def _measure(
    parallel: DataParallelModel, data: Data, reading: float | None, repeats: int
) -> Explanation:
    pieces = Pieces(parallel, data)
    shards = pieces.shards(data)
    watch = stopwatch.Stopwatch(data, eager=bool(parallel.run_eagerly))
    for name, piece in pieces.up_to().items():
        watch.add(name, piece)
    # Eagerly first: variables that the template still lacks cannot be made in a graph.
    pieces.template_step(data)
    watch.add("template", pieces.template_step, jit=parallel.template.jit_compile)
    for device, part in zip(parallel.devices, shards.parts, strict=False):
        given = (part["call"]["args"][0], part["y"], part["weights"])
        for name, piece in pieces.alone(device).items():
            watch.add(f"{device} {name}", piece, given)
    for name, piece in pieces.alone(parallel.devices[0]).items():
        watch.add(f"whole {name}", piece)
    times = watch.shortest(repeats)
    decision = losses.decide(parallel.loss)
    busiest, busiest_bytes = _busiest(parallel, pieces, data)
    return Explanation(
        batch_size=int(shards.total),
        loss_on="towers" if pieces.divided else "merged",
        why_merged="" if pieces.divided else parallel.loss_path.reason or _NOT_ROWS,
        may_divide=not pieces.divided and decision.reduction is not None,
        merge_device=parallel.merge_device,
        towers=_towers(parallel.devices, list(map(int, shards.rows)), times),
        whole_batch=max(0.0, times["whole backward"] - times["whole weights out"]),
        template=times["template"],
        reading=reading,
        eager=bool(parallel.run_eagerly),
        homes=_homes(parallel),
        busiest=busiest,
        busiest_bytes=busiest_bytes,
        **_differences(times, divided=pieces.divided),
    )


def _homes(parallel: DataParallelModel) -> dict[str, int]:
    """The bytes of weights on each device that some live on."""
    found: dict[str, int] = {}
    for variable in parallel.template.variables:
        home = parallel.homes.of(variable)
        found[home] = found.get(home, 0) + size_of(variable)
    return found


def _busiest(parallel: DataParallelModel, pieces: Pieces, data: Data) -> tuple[str, int]:
    """The device with the most to receive, or to send, in a step, and how many bytes."""
    if parallel.run_eagerly or parallel.num_towers == 1:
        return "", 0
    gpus = [device for device in parallel.devices if is_gpu(device)]
    graph = pieces.graph(data)
    return traffic(graph, parallel.homes.handles(), gpus[0] if gpus else "").busiest


_NOT_ROWS: Final = "an output or input is ragged or sparse, has a mask, or has no axis besides rows"


def _towers(
    devices: tuple[str, ...], rows: list[int], times: dict[str, float]
) -> tuple[TowerTimes, ...]:
    busy = {}
    for device in devices[: len(rows)]:
        ready, forward, backward = (
            times[f"{device} {name}"] for name in ("weights out", "forward", "backward")
        )
        forward = max(0.0, forward - ready)
        busy[device] = (forward, max(0.0, backward - ready - forward))
    slowest = max(map(sum, busy.values()))
    idle = len(devices) - len(rows)
    return tuple(
        TowerTimes(device, count, *times_of, waiting=slowest - sum(times_of))
        for device, count, times_of in zip(
            devices, [*rows, *[0] * idle], [*busy.values(), *[(0.0, 0.0)] * idle], strict=True
        )
    )


def _differences(times: dict[str, float], *, divided: bool) -> dict[str, float]:
    """The times of the pieces, from those of the step up to each of them."""

    def between(first: str, second: str) -> float:
        return max(0.0, times[second] - times[first])

    together = between("weights out", "towers")
    merging = between("towers", "merging")
    if not divided:
        together += between("merging outputs", "backward")
        merging = between("towers", "merging outputs") + between("backward", "merging")
    return {
        "starting": times["start"],
        "sharding": between("start", "sharding"),
        "weights_out": between("sharding", "weights out"),
        "together": together,
        "merging": merging,
        "update": between("merging", "step"),
        "step": times["step"],
    }


@contextlib.contextmanager
def _unchanged(parallel: DataParallelModel) -> Iterator[None]:
    """Puts every variable of the model, its optimizer and its metrics back to what it was."""

    def variables() -> dict[int, keras.Variable]:
        holders = (parallel, parallel.template)
        found = [*parallel.optimizer.variables]
        for holder in holders:
            found += [*holder.variables, *holder.metrics_variables]
        return {id(variable): variable for variable in found}

    parallel.optimizer.build(parallel.trainable_variables)
    # On the host: a second copy of everything may not fit on a device.
    before = {key: (variable, variable.numpy()) for key, variable in variables().items()}
    try:
        yield
    finally:
        for variable, value in before.values():
            variable.assign(value)
        for metric in [*parallel.metrics, *parallel.template.metrics]:
            if not all(id(variable) in before for variable in metric.variables):
                metric.reset_state()


def _check(parallel: Any, repeats: int) -> None:
    if not isinstance(parallel, DataParallelModel):
        raise TypeError(
            "Expected `parallel` to be a DataParallelModel. "
            f"Received: parallel={parallel!r} (of type {type(parallel).__name__}). "
            "Wrap the model: explain(DataParallelModel(model), batch)."
        )
    if repeats < 1:
        raise ValueError(f"Expected `repeats` to be at least 1. Received: repeats={repeats}.")
    if not parallel.compiled or parallel.optimizer is None:
        raise ValueError(
            "Only a compiled model has a training step to explain. "
            f"Received: parallel.compiled={parallel.compiled}. "
            'Call parallel.compile(optimizer="adam", loss=...) first.'
        )
    for holder, overridden in (
        (parallel.template, overrides(parallel.template, LEARNING)),
        (parallel, overrides(parallel, (*LEARNING, "call"), DataParallelModel)),
    ):
        if overridden:
            raise ValueError(
                "explain knows the pieces of Keras' own training step only. "
                f"Received: {type(holder).__name__}, which overrides `{overridden[0]}`. "
                "Explain the same model without it, or use the TensorFlow profiler."
            )
