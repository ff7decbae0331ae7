"""Each worker feeds its own rows: as many steps on all of them, some without rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from parallel_keras.workers.connection import Workers


# What Keras takes for arrays where it is given none.
KERAS_BATCH_SIZE = 32


class Feed:
    """Turns what a worker is given into a dataset with as many steps as the others have.

    A worker that runs out of rows goes on with empty batches, so that nobody waits for it.

    Args:
        workers: The `Workers`.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def training(self, arguments: dict[str, Any]) -> None:
        """Changes the arguments of `fit`.

        Args:
            arguments: By name; they are changed in place.

        Raises:
            ValueError: If there is a `validation_split`, or no number of steps.
        """
        if arguments.pop("validation_split", None):
            raise ValueError(
                "Expected no `validation_split` where each worker feeds its own rows. "
                "Received: a validation_split. Cut the rows yourself and pass validation_data."
            )
        shuffle = arguments.pop("shuffle", True)
        steps = arguments.get("steps_per_epoch")
        self._feed(arguments, steps, "steps_per_epoch", shuffle=bool(shuffle))

    def validation(self, arguments: dict[str, Any]) -> None:
        """Changes the validation data among the arguments of `fit`."""
        data = arguments.get("validation_data")
        if data is None:
            return
        pair = data if isinstance(data, (tuple, list)) else (data,)
        validation = dict(zip(("x", "y", "sample_weight"), pair, strict=False))
        size = arguments.pop("validation_batch_size", None) or self._batch_size
        validation["batch_size"] = None if isinstance(validation["x"], tf.data.Dataset) else size
        self._feed(validation, arguments.get("validation_steps"), "validation_steps", shuffle=False)
        arguments["validation_data"] = validation["x"]

    def evaluation(self, arguments: dict[str, Any]) -> None:
        """Changes the arguments of `evaluate` or `predict`."""
        self._feed(arguments, arguments.get("steps"), "steps", shuffle=False)

    def _feed(
        self, arguments: dict[str, Any], steps: int | None, argument: str, *, shuffle: bool
    ) -> None:
        data = tuple(arguments.pop(name, None) for name in ("x", "y", "sample_weight"))
        self._batch_size: int = arguments.pop("batch_size", None) or KERAS_BATCH_SIZE
        dataset = _dataset(data, self._batch_size, shuffle=shuffle)
        if steps is None:
            steps = int(dataset.cardinality())
            with self._workers.naming_faults():
                told = self._workers.gather([tf.constant(steps, tf.int64)], "start")
            steps = max(int(count) for (count,) in told)
            if min(int(count) for (count,) in told) < 0:
                raise ValueError(
                    "The workers must take as many steps each, but the number of batches of a "
                    f"dataset is not known. Expected: `{argument}`, or datasets of known "
                    f"cardinality. Received: {argument}=None and cardinalities "
                    f"{[int(count) for (count,) in told]}. Pass {argument}, the same on all "
                    "workers."
                )
            padded = _and_empty(dataset, steps - int(dataset.cardinality()))
        else:
            padded = _and_empty(dataset, None)
        arguments["x"] = padded


def _dataset(data: tuple[Any, Any, Any], batch_size: int, *, shuffle: bool) -> tf.data.Dataset:
    x, y, sample_weight = data
    if isinstance(x, tf.data.Dataset):
        return x
    leaves = tf.nest.flatten(data)
    if not all(
        leaf is None or tf.is_tensor(leaf) or isinstance(leaf, np.ndarray) for leaf in leaves
    ):
        raise ValueError(
            "Expected arrays or a tf.data.Dataset where each worker feeds its own rows. "
            f"Received: x of type {type(x).__name__}. Make a dataset of it, for example with "
            "tf.data.Dataset.from_generator."
        )
    given = [value for value in (x, y, sample_weight) if value is not None]
    rows = tf.data.Dataset.from_tensor_slices(tuple(given) if len(given) > 1 else (x,))
    if shuffle:
        rows = rows.shuffle(max(int(rows.cardinality()), 1))
    return rows.batch(batch_size)


def _and_empty(dataset: tf.data.Dataset, count: int | None) -> tf.data.Dataset:
    """The dataset, then so many batches of no rows (for ever, for `None`)."""

    def relaxed(spec: Any) -> Any:
        if not isinstance(spec, tf.TensorSpec):
            raise TypeError(
                "Expected dense tensors where each worker feeds its own rows. "
                f"Received: a dataset with {spec}. Feed the same batches on all workers."
            )
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    specs = tf.nest.map_structure(relaxed, dataset.element_spec)
    empty = tf.nest.map_structure(
        lambda spec: tf.zeros([0, *(size or 0 for size in spec.shape[1:])], spec.dtype), specs
    )
    blank = tf.data.Dataset.from_tensors(empty).repeat(count)
    return _blurred(dataset, specs).concatenate(_blurred(blank, specs))


def _blurred(dataset: tf.data.Dataset, specs: Any) -> tf.data.Dataset:
    """Hides batch sizes, so that full and empty batches are of one kind."""

    def blur(*batch: Any) -> Any:
        nest = batch if isinstance(dataset.element_spec, tuple) else batch[0]
        return tf.nest.map_structure(
            lambda leaf, spec: tf.compat.v1.placeholder_with_default(leaf, spec.shape), nest, specs
        )

    return dataset.map(blur)
