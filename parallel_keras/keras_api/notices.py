"""What the log says: one line when a model is wrapped, and what a user should change."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final

import keras
import tensorflow as tf
from absl import logging

from parallel_keras import _compat
from parallel_keras.hardware import gpu_memories
from parallel_keras.workers.own_rows import KERAS_BATCH_SIZE

# Below this, starting the work on a device takes longer than the work of most layers.
FEWEST_ROWS: Final = 4
# Mean and variance of fewer rows are too far from those of the batch to train well with: error
# rises steeply below 8 images (Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494).
FEWEST_ROWS_TO_NORMALISE: Final = 8


class Notices:
    """Tells the log about one wrapped model, each thing once.

    Args:
        template: The model.
        devices: Canonical device names.
    """

    def __init__(self, template: keras.Model, devices: Sequence[str]) -> None:
        self._template, self._devices = template, devices
        self._said: set[str] = set()

    def wrapped(self, parallel: Any) -> None:
        """Says what was made of the model, and whether the devices fit each other.

        Args:
            parallel: The `DataParallelModel`.
        """
        count = len(self._devices)
        logging.info(
            "DataParallelModel(%s): %s on %s; loss: %s",
            self._template.name,
            "1 tower" if count == 1 else f"{count} towers",
            ", ".join(self._devices),
            _loss_in_words(parallel),
        )
        memories = gpu_memories(self._devices)
        if len(set(memories.values())) > 1:
            self._warn(
                "memory",
                "The devices have memories of different sizes (%s). Each gets as many rows, so the "
                "smallest limits the batch. Leave it out with devices=[...], or hide it with "
                "CUDA_VISIBLE_DEVICES.",
                ", ".join(f"{device}: {size:,} MB" for device, size in memories.items()),
            )

    def fitting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at the batches that are about to be trained on.

        Args:
            args: Positional arguments of `fit`.
            kwargs: Keyword arguments of `fit`.
        """
        given = inspect.signature(keras.Model.fit).bind(None, *args, **kwargs).arguments
        rows = _rows_of_a_batch(given.get("x"), given.get("batch_size"))
        if len(self._devices) > 1:
            self._exceptions()
            self._untraced()
            if rows is not None:
                self._batch(rows)

    def _exceptions(self) -> None:
        """Says what is documented to be another number than on one device."""
        layers = _compat.all_layers(self._template)
        random = [layer.name for layer in layers if _draws(layer)]
        found = []
        if random:
            found.append(f"layer {_and_others(random)} draws other random numbers on each device")
        by_shard = [layer.name for layer in layers if _normalises_by_shard(layer)]
        if by_shard:
            found.append(
                f"layer {_and_others(by_shard)} normalises the rows of each device by themselves, "
                "unless it is built with synchronized=True"
            )
        if found:
            self._warn(
                "exceptions",
                "Other numbers than on one device, as documented: %s. The rest is the same; "
                "parallel_keras.verify(parallel, batch) shows it.",
                "; ".join(found),
            )

    def _untraced(self) -> None:
        """Says what nothing can know of code that is not traced."""
        mine = [
            layer.name
            for layer in _compat.all_layers(self._template)
            if not type(layer).__module__.startswith("keras.")
        ]
        if self._template.run_eagerly and mine:
            self._warn(
                "eager",
                "run_eagerly=True: there is no graph that tells whether layer %s looks at several "
                "rows at once, which would be another number on each device. "
                "parallel_keras.verify(parallel, batch) tells.",
                _and_others(mine),
            )

    def _batch(self, rows: int) -> None:
        towers = len(self._devices)
        if rows < FEWEST_ROWS * towers:
            self._warn(
                "rows",
                "A batch of %d rows gives each of %d devices fewer than %d, which is mostly slower "
                "than one device. Use a larger batch_size (it is that of all devices together) or "
                "fewer devices; parallel_keras.explain(parallel, batch) measures it.",
                *(rows, towers, FEWEST_ROWS),
            )
        layer = self._normalising_by_shard()
        if layer is not None and rows < FEWEST_ROWS_TO_NORMALISE * towers:
            self._warn(
                "normalisation",
                "Layer %r normalises the rows of each device by themselves, and a batch of %d rows "
                "gives each of %d devices fewer than %d. Use a larger batch, or build the layer "
                "with synchronized=True: then it normalises the whole batch, as on one device.",
                *(layer.name, rows, towers, FEWEST_ROWS_TO_NORMALISE),
            )

    def _normalising_by_shard(self) -> keras.layers.Layer | None:
        return next(filter(_normalises_by_shard, _compat.all_layers(self._template)), None)

    def _warn(self, what: str, message: str, *arguments: Any) -> None:
        if what not in self._said:
            self._said.add(what)
            logging.warning(message, *arguments)


def _normalises_by_shard(layer: keras.layers.Layer) -> bool:
    is_normalisation = isinstance(layer, keras.layers.BatchNormalization)
    return is_normalisation and layer.trainable and not layer.synchronized


def _draws(layer: keras.layers.Layer) -> bool:
    drawing = any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
    known = [rate for rate in rates if isinstance(rate, (int, float))]
    return drawing and (not known or any(known))


def _and_others(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _loss_in_words(parallel: Any) -> str:
    if parallel.loss_on != "auto":
        return f"{parallel.loss_on}, as asked for"
    if not parallel.compiled:
        return "auto, known after compile()"
    path = parallel.loss_path
    return "on the towers" if path.reduction else f"merged ({path.reason})"


def _rows_of_a_batch(x: Any, batch_size: int | None) -> int | None:
    """The rows of all but the last batch, or `None` if only reading one would tell."""
    is_dataset = isinstance(x, tf.data.Dataset)
    leaves = tf.nest.flatten(x.element_spec if is_dataset else x)
    sizes = [leaf.shape[0] for leaf in leaves if getattr(leaf, "shape", ())]
    if not sizes or sizes[0] is None or is_dataset:
        return sizes[0] if sizes else None
    return min(sizes[0], batch_size or KERAS_BATCH_SIZE)
