"""Files hold the template, whole or not at all, and go between any numbers of devices."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.keras_api import atomic
from tests.parity import ATOL, RTOL, assert_same_variables, mlp, pair, rows

X, Y = rows(10, 6), rows(10, 3, seed=1)


def compiled(build: Callable[[], keras.Model] = mlp) -> keras.Model:
    keras.utils.set_random_seed(7)
    model = build()
    # Keras cannot read the short names of losses back from `.h5`.
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    return model


def wrapped(model: keras.Model, towers: int) -> keras.Model:
    """0 towers: the bare model."""
    return pk.DataParallelModel(model, towers) if towers else model


def trained(towers: int, build: Callable[[], keras.Model] = mlp) -> keras.Model:
    model = wrapped(compiled(build), towers)
    model.fit(X, Y, batch_size=7, verbose=0)
    return model


def save(model: keras.Model, path: str) -> None:
    if path.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.endswith((".keras", ".h5")):
        model.save(path)
    else:
        model.save(path, zipped=False)


def load(path: str) -> keras.Model:
    if not path.endswith(".weights.h5"):
        return keras.saving.load_model(path)
    model = compiled()
    model.optimizer.build(model.trainable_variables)
    return model


FORMS = ["model.keras", "model.h5", "model", "model.weights.h5"]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("form", FORMS)
def test_files_go_between_any_numbers_of_devices(form: str, tmp_path: Path) -> None:
    """S2: https://github.com/keras-team/keras/issues/8212. All 9 pairs, optimizer included."""
    for source in (0, 2, 3):
        writer = trained(source)
        path = str(tmp_path / f"{source}-{form}")
        save(writer, path)
        for target in (0, 2, 3):
            reader = wrapped(load(path), target)
            if form == "model.weights.h5":
                reader.load_weights(path)
            np.testing.assert_allclose(reader(X), writer(X), rtol=RTOL, atol=ATOL)
            if form == "model.h5":  # Keras does not read the optimizer back from these.
                continue
            pairs = zip(writer.optimizer.variables, reader.optimizer.variables, strict=True)
            for one, other in pairs:
                np.testing.assert_array_equal(other.numpy(), one.numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}-{form}" for n in (0, 2, 3)]


def test_the_optimizer_keeps_its_class(tmp_path: Path) -> None:
    """S8: https://github.com/horovod/horovod/issues/1920."""

    @keras.saving.register_keras_serializable(package="tests")
    class Own(keras.optimizers.SGD):
        pass

    model, optimizer = mlp(), Own(0.1)
    parallel = pk.DataParallelModel(model, 2)
    parallel.compile(optimizer, "mse")
    parallel.fit(X, Y, verbose=0)
    assert parallel.optimizer is model.optimizer is optimizer
    parallel.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    assert config["class_name"] == "Sequential"
    assert config["compile_config"]["optimizer"]["class_name"] == "Own"
    assert "parallel_keras" not in json.dumps(config)
    assert type(keras.saving.load_model(tmp_path / "model.keras").optimizer) is Own


def test_normalisation_evaluates_as_before(tmp_path: Path) -> None:
    """S7: https://github.com/keras-team/keras/issues/14372."""

    def build() -> keras.Model:
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        )

    live = trained(3, build)
    live.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    again = pk.DataParallelModel(keras.saving.load_model(tmp_path / "model.keras"), 4)
    expected = live.evaluate(X, Y, batch_size=7, verbose=0)
    for model in (live.template, reloaded, again):
        assert model.evaluate(X, Y, batch_size=7, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_the_wrapper_itself_survives_the_saving_functions(tmp_path: Path) -> None:
    """`keras.saving.save_model(parallel)` saves what it is given: a model on several devices."""
    parallel = trained(2)
    keras.saving.save_model(parallel, tmp_path / "wrapped.keras")
    again = keras.saving.load_model(tmp_path / "wrapped.keras")
    assert isinstance(again, pk.DataParallelModel)
    for model in (parallel, again):
        model.fit(X, Y, batch_size=7, verbose=0, shuffle=False)
    assert_same_variables(parallel.template, again)
    assert int(again.optimizer.iterations) == 4


class Breaks(keras.layers.Dense):
    """Fails when most of a file is written."""

    broken = False

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.broken:
            raise OSError("the disk is full")

    @property
    def trainable_weights(self) -> Any:
        if self.broken:
            raise OSError("the disk is full")
        return super().trainable_weights

    def call(self, inputs: Any, training: Any = None) -> Any:
        if self.broken:
            raise OSError("the disk is full")
        return super().call(inputs, training=training)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("form", [*FORMS, "served"])
def test_a_save_that_fails_changes_nothing(form: str, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        if form == "served":
            parallel.export(path, verbose=False)
        else:
            save(parallel, str(path))

    last = Breaks(3)
    parallel = pk.DataParallelModel(
        keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), last]), 2
    )
    write(tmp_path / form)
    (tmp_path / "other").write_text("mine")
    before = content(tmp_path)
    last.broken = True
    for path in (tmp_path / form, tmp_path / f"new-{form}"):
        with pytest.raises(Exception, match="the disk is full"):
            write(path)
    assert content(tmp_path) == before
    last.broken = False
    write(tmp_path / form)
    assert content(tmp_path).keys() >= before.keys()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """By the next save of the same file; the folder of a process that still writes stays."""
    parallel = pk.DataParallelModel(mlp(), 2)
    with atomic.atomic_path(tmp_path / "model.keras") as path:
        folder = Path(path).parent
        dead = folder.with_name(folder.name.replace(f".{folder.suffixes[-2][1:]}.", ".999999999."))
        alive = folder.with_name(folder.name.replace(f".{folder.suffixes[-2][1:]}.", ".1."))
        assert len({folder, dead, alive}) == 3
        Path(path).write_text("")
    for left in (dead, alive):
        left.mkdir()
        (left / "model.keras").write_text("half of it")
    parallel.save(tmp_path / "model.keras")
    assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "model.keras"])
    parallel.save(tmp_path / "other.keras")
    assert alive.exists()


def test_folders_keep_what_else_is_in_them(tmp_path: Path) -> None:
    parallel = pk.DataParallelModel(mlp(), 2)
    folder = tmp_path / "model"
    for write in (
        lambda: parallel.save(folder, zipped=False),
        lambda: parallel.export(folder, verbose=False),
    ):
        (folder / "variables").mkdir(parents=True, exist_ok=True)
        (folder / "variables" / "notes").write_text("mine")
        (folder / "notes").write_text("mine")
        write()
        assert (folder / "variables" / "notes").read_text() == "mine"
        assert (folder / "notes").read_text() == "mine"
    assert keras.saving.load_model(folder).count_params() == parallel.count_params()
    served = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(served.serve(X), parallel(X), rtol=RTOL, atol=ATOL)


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.keras").write_text("old")
    (tmp_path / "latest.keras").symlink_to(tmp_path / "real" / "1.keras")
    pk.DataParallelModel(mlp(), 2).save(tmp_path / "latest.keras")
    assert (tmp_path / "latest.keras").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "real" / "1.keras")


def test_missing_folders_are_made(tmp_path: Path) -> None:
    pk.DataParallelModel(mlp(), 2).save(tmp_path / "a" / "b" / "model.keras")
    assert (tmp_path / "a" / "b" / "model.keras").exists()


def test_several_files_of_one_save_are_moved_together(tmp_path: Path) -> None:
    with atomic.atomic_path(tmp_path / "model.json") as path:
        Path(path).write_text("index")
        Path(path).with_name("model_0.h5").write_text("part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model_0.h5"]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_overwrite_false_asks(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    parallel = pk.DataParallelModel(mlp(), 2)
    for name, write in (
        ("model.keras", parallel.save),
        ("model.weights.h5", parallel.save_weights),
    ):
        path = tmp_path / name
        write(path, overwrite=False)
        assert not asked
        path.write_text("old")
        write(path, False)
        assert str(path) in asked.pop()
        assert (path.read_bytes() == b"old") == (answer == "n")
    capsys.readouterr()


def test_addresses_are_left_to_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    parallel = pk.DataParallelModel(mlp(), 2)
    for name in ("save", "save_weights", "export"):
        monkeypatch.setattr(
            keras.Sequential, name, lambda self, path, *args, **kwargs: given.append(path)
        )
        getattr(parallel, name)("hf://someone/model")
    assert given == ["hf://someone/model"] * 3


CHECKPOINTS = {
    "full": {"filepath": "{epoch}.keras"},
    "weights": {"filepath": "{epoch}.weights.h5", "save_weights_only": True},
    "best": {"filepath": "{epoch}.keras", "save_best_only": True, "monitor": "loss", "mode": "max"},
    "batches": {"filepath": "{epoch}-{batch}.weights.h5", "save_freq": 3}
    | {"save_weights_only": True},
}


@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_checkpoints_are_those_of_one_device(kind: str, tmp_path: Path) -> None:
    """S1: https://github.com/keras-team/keras/issues/8123."""
    arguments = dict(CHECKPOINTS[kind])
    name = arguments.pop("filepath")
    # The highest loss is that of the first epoch: with mode="max" only that one is the best.
    models = pair(mlp, 3, optimizer=lambda: keras.optimizers.SGD(0.05), loss="mse")
    for folder, model in zip(("bare", "parallel"), models, strict=True):
        checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / folder / name), **arguments)
        model.fit(X, Y, batch_size=4, epochs=5, verbose=0, shuffle=False, callbacks=[checkpoint])
    expected = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert sorted(path.name for path in (tmp_path / "parallel").iterdir()) == expected
    assert len(expected) == {"best": 1, "batches": 5}.get(kind, 5)
    reader = mlp()
    for file in expected:
        values = []
        for folder in ("bare", "parallel"):
            reader.load_weights(tmp_path / folder / file)
            values.append(reader.get_weights())
        for one, other in zip(*values, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
