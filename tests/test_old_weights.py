"""Weight files of the historical multi_gpu_model, written here as Keras 2 laid them out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import parallel_keras as pk
from parallel_keras import files
from tests.parity import mlp, rng, rows

Named = list[tuple[str, np.ndarray]]


def convnet() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(3, name="last"),
        ]
    )


KERAS_2 = {"keras_version": "2.2.4", "backend": "tensorflow"}
SLICED = ["input_1", "lambda_1", "lambda_2", "sequential_1", "dense_2"]


def weights(template: keras.Model, frozen: Sequence[str] = (), names: Any = None) -> Named:
    """Distinct random values, named and ordered as Keras 2 did for a nested model.

    `Model.weights` of Keras 2 is `trainable_weights + non_trainable_weights`, each by layer.
    """
    random, first, then = rng(3), [], []
    for layer in template.layers:
        for variable in layer.weights:
            name = f"{(names or {}).get(layer.name, layer.name)}/{variable.name}:0"
            weight = (name, random.normal(size=variable.shape).astype("float32"))
            trained = layer.name not in frozen and not variable.name.startswith("moving_")
            (first if trained else then).append(weight)
    return first + then


def write(
    path: Path, nested: Named, *, full: bool = False, chunks: bool = False, **attrs: Any
) -> Path:
    """What `save_weights` (or `save`) of Keras 2.2.4 wrote for `multi_gpu_model(model, 2)`."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if full else file
        root.attrs["layer_names"] = [name.encode() for name in SLICED]
        for name, value in {**KERAS_2, **attrs}.items():
            root.attrs[name] = value.encode()
        for layer in SLICED:
            group = root.create_group(layer)
            own = nested if layer == "sequential_1" else []
            names = [name.encode() for name, _ in own]
            if chunks and own:
                group.attrs["weight_names0"], group.attrs["weight_names1"] = names[:3], names[3:]
            else:
                group.attrs["weight_names"] = names
            for name, value in own:
                group.create_dataset(name, data=value)
    return path


def assert_loaded(template: keras.Model, nested: Named, names: Any = None) -> None:
    values = dict(nested)
    for layer in template.layers:
        for variable in layer.weights:
            name = f"{(names or {}).get(layer.name, layer.name)}/{variable.name}:0"
            np.testing.assert_array_equal(variable.numpy(), values[name], err_msg=name)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
def test_weights_are_found_in_the_nested_model(full: bool, chunks: bool, tmp_path: Path) -> None:
    """S2: https://github.com/keras-team/keras/issues/8212."""
    template = convnet()
    nested = weights(template)
    # Trained ones first: what BatchNormalization only keeps comes after the last layer.
    assert [name for name, _ in nested][-2:] == ["norm/moving_mean:0", "norm/moving_variance:0"]
    path = write(tmp_path / "old.h5", nested, full=full, chunks=chunks)
    files.load_multi_gpu_weights(template, path)
    assert_loaded(template, nested)
    x = rows(5, 6, 6, 1)
    np.testing.assert_allclose(pk.DataParallelModel(template, 2)(x), template(x), rtol=1e-5)


def test_names_are_enough_where_layers_were_frozen(tmp_path: Path) -> None:
    template = convnet()
    nested = weights(template, frozen=["first", "norm"])
    assert nested[0][0] == "last/kernel:0"
    files.load_multi_gpu_weights(template, write(tmp_path / "old.h5", nested))
    assert_loaded(template, nested)


NUMBERED = {"first": "conv2d_1", "norm": "batch_normalization_1", "last": "dense_1"}


def test_order_is_enough_where_names_differ(tmp_path: Path) -> None:
    """Names that Keras made up count from 1 in Keras 2 and differ in Keras 3."""
    template = convnet()
    template.get_layer("first").trainable = False
    nested = weights(template, frozen=["first"], names=NUMBERED)
    files.load_multi_gpu_weights(template, write(tmp_path / "old.h5", nested))
    assert_loaded(template, nested, NUMBERED)


def same_sizes() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="last"),
        ]
    )


def test_another_order_is_refused_also_where_shapes_fit(tmp_path: Path) -> None:
    """A moving mean of 3 numbers is not a bias of 3 numbers."""
    template = same_sizes()
    before = template.get_weights()
    nested = weights(template, frozen=["norm"], names={"norm": "bn_1", "last": "dense_1"})
    path = write(tmp_path / "old.h5", nested)
    with pytest.raises(ValueError, match=r"'dense_1/kernel:0' to fit .*freeze the layers"):
        files.load_multi_gpu_weights(template, path)
    swapped = [nested[2], nested[1], nested[0], *nested[3:]]
    template.get_layer("norm").trainable = False
    with pytest.raises(ValueError, match="to fit"):
        files.load_multi_gpu_weights(template, write(tmp_path / "swapped.h5", swapped))
    for old, new in zip(before, template.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    files.load_multi_gpu_weights(template, path)
    assert_loaded(template, nested, {"norm": "bn_1", "last": "dense_1"})


def test_names_that_stand_for_several_layers_are_not_used(tmp_path: Path) -> None:
    def part(name: str) -> keras.Model:
        layer = keras.layers.Dense(2, name="dense")
        return keras.Sequential([keras.Input((2,)), layer], name=name)

    template = keras.Sequential([keras.Input((2,)), part("a"), part("b")])
    random = rng(1)
    values = [random.normal(size=v.shape).astype("float32") for v in template.weights]
    names = ["a/dense/kernel:0", "a/dense/bias:0", "b/dense/kernel:0", "b/dense/bias:0"]
    nested = list(zip(names, values, strict=True))
    files.load_multi_gpu_weights(template, write(tmp_path / "old.h5", nested))
    for one, other in zip(values, template.get_weights(), strict=True):
        np.testing.assert_array_equal(other, one)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    template = convnet()
    nested, path = weights(template), tmp_path / "old.h5"
    with pytest.raises(ValueError, match=r"with 8 weights, those of .*with 7, from 'first/kernel"):
        files.load_multi_gpu_weights(template, write(path, nested[:-1]))
    wrong = [(nested[0][0], np.zeros((1, 2))), *nested[1:]]
    with pytest.raises(ValueError, match=r"to fit '.*kernel' of shape .*shape=\(1, 2\)"):
        files.load_multi_gpu_weights(template, write(path, wrong))
    with pytest.raises(ValueError, match=r"not built\. Build it first"):
        files.load_multi_gpu_weights(keras.Sequential([keras.layers.Dense(1)]), path)


@pytest.mark.parametrize("attrs", [{"keras_version": "1.2.2"}, {"backend": "theano"}])
def test_files_of_other_origin(attrs: dict[str, str], tmp_path: Path) -> None:
    template = convnet()
    path = write(tmp_path / "old.h5", weights(template), **attrs)
    with pytest.raises(ValueError, match=r"Keras 2 on TensorFlow.*(theano|1\.2\.2)"):
        files.load_multi_gpu_weights(template, path)


def test_files_of_plain_models(tmp_path: Path) -> None:
    template = mlp()
    template.save_weights(tmp_path / "new.weights.h5")
    with pytest.raises(ValueError, match=r"lists its layers in `layer_names`.*Files of Keras 3"):
        files.load_multi_gpu_weights(template, tmp_path / "new.weights.h5")
    template.save(tmp_path / "plain.h5")
    with pytest.raises(ValueError, match=r"one layer, the model itself.*template.load_weights"):
        files.load_multi_gpu_weights(template, tmp_path / "plain.h5")
