"""Weight files that the historical multi_gpu_model wrote.

tests/data/keras2/ holds what Keras 2.3.1 (`keras-...`) and tf.keras of TensorFlow 1.15 (`tf-...`)
wrote after some training of `multi_gpu_model(model, ...)`: `-parallel.h5` by `save`,
`-parallel.weights.h5` by `save_weights`, and `.npz` with what the model predicted then.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import parallel_keras as pk
from parallel_keras import files
from tests.parity import mlp, rows

FOLDER = Path(__file__).parent / "data" / "keras2"


def cnn(prefix: str = "", **_: Any) -> keras.Model:
    image, extra = keras.Input((8, 8, 3)), keras.Input((4,))
    layers = keras.layers
    x = layers.Conv2D(4, 3, padding="same", name=f"{prefix}conv_a")(image)
    x = layers.ReLU()(layers.BatchNormalization(name=f"{prefix}bn_a")(x))
    x = layers.BatchNormalization(name=f"{prefix}bn_b")(
        layers.Conv2D(6, 3, name=f"{prefix}conv_b")(x)
    )
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), extra])
    x = layers.Dense(5, "relu", name=f"{prefix}hidden")(x)
    kind = layers.Dense(3, "softmax", name=f"{prefix}kind")(x)
    return keras.Model([image, extra], [kind, layers.Dense(1, name=f"{prefix}size")(x)])


def frozen(prefix: str = "", freeze: bool = True, width: int = 5, **_: Any) -> keras.Model:
    first = keras.layers.Dense(6, name=f"{prefix}first", trainable=not freeze)
    norm = keras.layers.BatchNormalization(name=f"{prefix}norm")
    rest = [keras.layers.Dense(4, name=f"{prefix}second")]
    rest += [keras.layers.Dense(2, name=f"{prefix}last")]
    return keras.Sequential([keras.Input((width,)), first, norm, *rest])


def nested(prefix: str = "", **_: Any) -> keras.Model:
    layers = [keras.layers.Dense(4, name=f"{prefix}enc_a")]
    layers += [keras.layers.Dense(2, name=f"{prefix}enc_b")]
    encoder = keras.Sequential([keras.Input((3,)), *layers])
    left, right = keras.Input((3,)), keras.Input((3,))
    apart = keras.layers.Subtract()([encoder(left), encoder(right)])
    return keras.Model([left, right], keras.layers.Dense(1, name=f"{prefix}score")(apart))


def old_hard_sigmoid(x: Any) -> Any:
    """That of Keras 2; the one of Keras 3 is `relu6(x + 3) / 6`."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def lstm(prefix: str = "", by: str = "keras", **_: Any) -> keras.Model:
    words = keras.Input((6,), dtype="int32")
    if by == "keras":
        cell = keras.layers.Bidirectional(keras.layers.LSTM(4), name=f"{prefix}bi")
    else:
        cell = keras.layers.LSTM(4, recurrent_activation=old_hard_sigmoid, name=f"{prefix}lstm")
    x = keras.layers.Embedding(20, 5, mask_zero=True, name=f"{prefix}emb")(words)
    return keras.Model(words, keras.layers.Dense(2, "softmax", name=f"{prefix}out")(cell(x)))


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "cnn": cnn,
    "frozen": frozen,
    "nested": nested,
    "lstm": lstm,
}
WRITTEN = sorted(FOLDER.glob("*.h5"))


def build(path: Path, prefix: str = "", **changes: Any) -> keras.Model:
    by, name, *_ = path.name.split("-")
    return BUILDERS[name](prefix, by=by, **changes)


def assert_predicts_as_then(template: Any, path: Path) -> None:
    with np.load(FOLDER / (path.name.rpartition("-")[0] + ".npz")) as then:
        x = [then[name] for name in sorted(then.files) if name.startswith("x")]
        expected = [then[name] for name in sorted(then.files) if name.startswith("pred")]
    found = keras.tree.flatten(template.predict(x if len(x) > 1 else x[0], verbose=0))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_files_of_both_kerases_and_both_kinds_are_there() -> None:
    assert len(WRITTEN) == 11
    assert {path.name.split("-")[0] for path in WRITTEN} == {"keras", "tf"}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
@pytest.mark.parametrize("prefix", ["", "my_"])
def test_they_predict_what_they_predicted_then(path: Path, prefix: str) -> None:
    """S2: https://github.com/keras-team/keras/issues/8212.

    By the names of the layers, or, where those are others, by their order.
    """
    template = build(path, prefix)
    pk.load_multi_gpu_weights(template, path)
    assert_predicts_as_then(template, path)
    assert_predicts_as_then(pk.DataParallelModel(template, 3), path)


@pytest.mark.parametrize("by", ["keras", "tf"])
def test_names_are_enough_where_layers_were_frozen(by: str) -> None:
    """Keras 2 wrote what was trained first, so that the order is another one."""
    path = FOLDER / f"{by}-frozen-parallel.weights.h5"
    template = build(path, freeze=False)
    files.load_multi_gpu_weights(template, path)
    assert_predicts_as_then(template, path)


def test_another_order_is_refused_also_where_names_differ() -> None:
    path = FOLDER / "keras-frozen-parallel.weights.h5"
    template = build(path, prefix="my_", freeze=False)
    before = template.get_weights()
    with pytest.raises(ValueError, match=r"'norm/gamma:0' to fit .*freeze the layers"):
        files.load_multi_gpu_weights(template, path)
    for old, new in zip(before, template.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def changed(path: Path, folder: Path, change: Callable[[h5py.Group], None]) -> Path:
    """A copy of a file, with something about it changed."""
    copy = folder / "changed.h5"
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        change(file)
    return copy


FROZEN = FOLDER / "tf-frozen-parallel.weights.h5"


def test_lists_of_names_may_be_cut_into_pieces(tmp_path: Path) -> None:
    """Keras 2 did so from 64 kB on."""

    def cut(root: h5py.Group) -> None:
        for group, attribute in ((root, "layer_names"), (root["sequential"], "weight_names")):
            names = group.attrs[attribute]
            del group.attrs[attribute]
            group.attrs[f"{attribute}0"], group.attrs[f"{attribute}1"] = names[:3], names[3:]

    template = frozen()
    files.load_multi_gpu_weights(template, changed(FROZEN, tmp_path, cut))
    assert_predicts_as_then(template, FROZEN)


def test_same_shapes_in_another_order_are_refused(tmp_path: Path) -> None:
    """A moving mean of 6 numbers is not a bias of 6 numbers."""

    def swap(root: h5py.Group) -> None:
        names = [name.decode() for name in root["sequential"].attrs["weight_names"]]
        one, other = names.index("first/bias:0"), names.index("norm/moving_mean:0")
        names[one], names[other] = names[other], names[one]
        root["sequential"].attrs["weight_names"] = [name.encode() for name in names]

    template = frozen(prefix="my_")
    with pytest.raises(ValueError, match=r"'norm/moving_mean:0' to fit '.*first/bias"):
        files.load_multi_gpu_weights(template, changed(FROZEN, tmp_path, swap))


def test_names_that_stand_for_several_layers_are_not_used(tmp_path: Path) -> None:
    def part(name: str) -> keras.Model:
        layer = keras.layers.Dense(2, name="dense")
        return keras.Sequential([keras.Input((2,)), layer], name=name)

    template = keras.Sequential([keras.Input((2,)), part("a"), part("b")])
    values = [rows(*variable.shape, seed=seed) for seed, variable in enumerate(template.weights)]
    names = ["a/dense/kernel:0", "a/dense/bias:0", "b/dense/kernel:0", "b/dense/bias:0"]

    def exchange(root: h5py.Group) -> None:
        root["sequential"].attrs["weight_names"] = [name.encode() for name in names]
        for name, value in zip(names, values, strict=True):
            root["sequential"].create_dataset(name, data=value)

    files.load_multi_gpu_weights(template, changed(FROZEN, tmp_path, exchange))
    for one, other in zip(values, template.get_weights(), strict=True):
        np.testing.assert_array_equal(other, one)


def test_templates_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"with 4 weights, those of .*with 10, from 'norm/gamma"):
        files.load_multi_gpu_weights(mlp(), FROZEN)
    with pytest.raises(ValueError, match=r"'first/kernel:0' to fit '.*shape=\(5, 6\)"):
        files.load_multi_gpu_weights(frozen(width=7), FROZEN)
    with pytest.raises(ValueError, match=r"not built\. Build it first"):
        files.load_multi_gpu_weights(keras.Sequential([keras.layers.Dense(1)]), FROZEN)


@pytest.mark.parametrize("attrs", [{"keras_version": "1.2.2"}, {"backend": "theano"}])
def test_files_of_other_origin(attrs: dict[str, str], tmp_path: Path) -> None:
    path = changed(FROZEN, tmp_path, lambda root: root.attrs.update(attrs))
    with pytest.raises(ValueError, match=r"Keras 2 on TensorFlow.*(theano|1\.2\.2)"):
        files.load_multi_gpu_weights(frozen(), path)


def plain(folder: Path, name: str) -> Path:
    """A file of the template itself, laid out as in Keras 2."""
    path = folder / name
    with h5py.File(FROZEN, "r") as source, h5py.File(path, "w") as file:
        file.attrs.update(source.attrs)
        nested = source["sequential"]
        layers = ["first", "norm", "second", "last"]
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            own = [each for each in nested.attrs["weight_names"] if each.decode().startswith(layer)]
            file.create_group(layer).attrs["weight_names"] = own
            for each in own:
                file[layer].create_dataset(each.decode(), data=nested[each.decode()][...])
    return path


def test_files_of_plain_models(tmp_path: Path) -> None:
    template = mlp()
    template.save_weights(tmp_path / "new.weights.h5")
    with pytest.raises(ValueError, match=r"lists its layers in `layer_names`.*Files of Keras 3"):
        files.load_multi_gpu_weights(template, tmp_path / "new.weights.h5")
    with pytest.raises(ValueError, match=r"one layer, the model itself.*template.load_weights"):
        files.load_multi_gpu_weights(frozen(), plain(tmp_path, "plain.h5"))


def test_plain_files_are_renamed_before_keras_3_reads_them(tmp_path: Path) -> None:
    """Their name says which Keras wrote them; our error says so, and so does the guide."""
    template, path = frozen(), plain(tmp_path, "old.weights.h5")
    with pytest.raises(ValueError, match=r"could not be loaded"):
        template.load_weights(path)
    with pytest.raises(ValueError, match=r"Rename it to old\.h5.*template\.load_weights"):
        files.load_multi_gpu_weights(template, path)
    template.load_weights(path.rename(tmp_path / "old.h5"))
    assert_predicts_as_then(template, FROZEN)


def test_old_names_of_checkpoints_are_refused_by_keras() -> None:
    """What the guide says of `.hdf5`; files of that name can still be read."""
    with pytest.raises(ValueError, match=r"must end in `\.keras`"):
        keras.callbacks.ModelCheckpoint("{epoch}.hdf5")
    with pytest.raises(ValueError, match=r"must end in `\.weights\.h5`"):
        keras.callbacks.ModelCheckpoint("{epoch}.hdf5", save_weights_only=True)


def test_old_names_of_files_can_be_read(tmp_path: Path) -> None:
    template = frozen()
    template.load_weights(plain(tmp_path, "old.hdf5"))
    assert_predicts_as_then(template, FROZEN)


def test_hard_sigmoid_is_another_function() -> None:
    x = np.array([-2.8, -1.0, 0.0, 1.0, 2.8], "float32")
    then = keras.ops.convert_to_numpy(old_hard_sigmoid(x))
    np.testing.assert_allclose(then, [0.0, 0.3, 0.5, 0.7, 1.0], atol=1e-6)
    now = keras.ops.convert_to_numpy(keras.activations.hard_sigmoid(x))
    assert np.abs(now - then).max() > 0.03
