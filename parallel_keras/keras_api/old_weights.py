"""Weight files that the `multi_gpu_model` of Keras 2 wrote."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import h5py
import keras
import numpy as np

# Named alike by Keras 2 and 3: one of them in the place of another shows that the order differs.
_KINDS = frozenset(
    {"beta", "bias", "embeddings", "gamma", "kernel", "moving_mean", "moving_variance"}
    | {"recurrent_kernel"}
)


def load_multi_gpu_weights(template: keras.Model, path: str | os.PathLike[str]) -> None:
    """Loads a `.h5` file that `multi_gpu_model(...)` of Keras 2 wrote into its template.

    Such a file holds the template as one layer among those that sliced and joined the
    batch, so that Keras can load it into nothing else. Files of `save_weights` and of
    `save` will do; of the latter only the weights are read.

    Keras 2 put the weights that were being trained first. Layers are matched by name
    where the file has the names of this template; else in order, and then the layers
    that were frozen in the file must be frozen in the template too.

    Args:
        template: Built `keras.Model` of the architecture that was saved.
        path: Path of the file.

    Raises:
        ValueError: If the file is of another kind, or does not fit the template. No
            weight is changed then.

    Example:
    ```python
    template = build_model()  # the same layers as in 2018
    pk.load_multi_gpu_weights(template, "multi_gpu.h5")
    parallel = pk.DataParallelModel(template)
    ```
    """
    if not template.built:
        raise ValueError(
            "Expected a template that has its weights, to load others into them. "
            f"Received: template={template.name!r}, not built. Build it first: "
            "template.build(input_shape)."
        )
    with h5py.File(path, "r") as file:
        _check_origin(file, path)
        saved = _nested_model(file.get("model_weights", file), path)
    variables = _matching(template, saved)
    if len(variables) != len(saved):
        raise ValueError(
            f"Expected a file with {len(variables)} weights, those of {template.name!r}. "
            f"Received: path={str(path)!r} with {len(saved)}, from {saved[0].name!r} to "
            f"{saved[-1].name!r}. Build the template of the architecture that was saved."
        )
    for variable, weight in zip(variables, saved, strict=True):
        if not _fits(variable, weight):
            raise ValueError(
                f"Expected weight {weight.name!r} to fit {variable.path!r} of shape "
                f"{tuple(variable.shape)}. Received: shape={weight.value.shape} in "
                f"path={str(path)!r}. Build the template of the architecture that was saved, "
                "and freeze the layers that were frozen then."
            )
    for variable, weight in zip(variables, saved, strict=True):
        variable.assign(weight.value)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One weight of the file, such as `"dense_1/kernel:0"`."""

    name: str
    value: np.ndarray

    @property
    def layer(self) -> str:
        """The name of its layer."""
        return self.name.rpartition("/")[0].rpartition("/")[-1]

    @property
    def kind(self) -> str:
        """What it is in its layer, such as `"kernel"`."""
        return self.name.rpartition("/")[-1].partition(":")[0]


def _check_origin(file: h5py.File, path: Any) -> None:
    attributes = file.get("model_weights", file).attrs
    found = {name: _text(attributes.get(name, "?")) for name in ("keras_version", "backend")}
    # Keras 1 and Theano kept the kernels of convolutions in other orders.
    if found["keras_version"].startswith(("0.", "1.")) or found["backend"] in ("theano", "cntk"):
        raise ValueError(
            "Expected a file of Keras 2 on TensorFlow: others order the weights of convolutions "
            f"differently. Received: path={str(path)!r} of {found}. Load it with Keras 2 on its "
            "own backend, and save it again on TensorFlow."
        )


def _nested_model(root: Any, path: Any) -> list[_Weight]:
    if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
        raise ValueError(
            "Expected a weight file of Keras 2, which lists its layers in `layer_names`. "
            f"Received: path={str(path)!r} with {sorted(root)[:5]}. Files of Keras 3 load with "
            "template.load_weights(path)."
        )
    groups = {name: _names(root[name], "weight_names") for name in _names(root, "layer_names")}
    filled = {name: weights for name, weights in groups.items() if weights}
    if len(filled) != 1:
        raise ValueError(
            "Expected a file of multi_gpu_model, in which one layer, the model itself, has all "
            f"the weights. Received: path={str(path)!r}, where these have some: "
            f"{list(filled)[:5]}. {_how_to_load_plain(path)}"
        )
    [(layer, names)] = filled.items()
    return [_Weight(name, np.asarray(root[layer][name])) for name in names]


def _how_to_load_plain(path: Any) -> str:
    name = pathlib.PurePath(path).name
    how = "The file of a plain model loads with template.load_weights(path)."
    if name.endswith(".weights.h5"):
        plain = name.removesuffix(".weights.h5") + ".h5"
        return f"Rename it to {plain}, since Keras 3 expects its own format in {name}. {how}"
    return how


def _matching(template: keras.Model, saved: Sequence[_Weight]) -> list[keras.Variable]:
    """The template's variables in the order of the file."""
    in_order = [*template.trainable_weights, *template.non_trainable_weights]
    names = [variable.path.rpartition("/")[0] for variable in template.weights]
    by_layer: dict[str, list[keras.Variable]] = {}
    for variable, name in zip(template.weights, names, strict=True):
        by_layer.setdefault(name.rpartition("/")[-1], []).append(variable)
    sizes = collections.Counter(weight.layer for weight in saved)
    alike = sizes == {name: len(variables) for name, variables in by_layer.items()}
    if not alike or len(set(names)) > len(by_layer):
        return in_order
    rest = {name: iter(variables) for name, variables in by_layer.items()}
    return [next(rest[weight.layer]) for weight in saved]


def _fits(variable: keras.Variable, weight: _Weight) -> bool:
    kinds = {variable.name, weight.kind}
    swapped = len(kinds) == 2 and kinds <= _KINDS
    return tuple(variable.shape) == weight.value.shape and not swapped


def _names(group: Any, attribute: str) -> list[str]:
    """A list of names, which Keras 2 cut into numbered attributes where it was too long."""
    if attribute in group.attrs:
        return [_text(name) for name in group.attrs[attribute]]
    names: list[str] = []
    for chunk in itertools.count():
        if f"{attribute}{chunk}" not in group.attrs:
            return names
        names += [_text(name) for name in group.attrs[f"{attribute}{chunk}"]]
    return names


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
