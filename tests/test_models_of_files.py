"""Which files the commands take for models, and what they say of those that are none."""

import zipfile
from pathlib import Path

import keras
import pytest

from parallel_keras.commands import CommandError
from parallel_keras.commands._outputs import check_writable
from parallel_keras.commands.machine import choose_model
from parallel_keras.measuring import models
from tests.parity import mlp


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models, and what may become of them."""
    folder = tmp_path_factory.mktemp("files")
    model = mlp()
    model.save(folder / "whole.keras")
    model.save(folder / "folder", zipped=False)
    model.save(folder / "whole.h5")
    model.save_weights(folder / "net.weights.h5")
    whole = (folder / "whole.keras").read_bytes()
    (folder / "half.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.keras").write_bytes(b"")
    (folder / "text.keras").write_text("not a model")
    spot = whole.index(b"dense") + 2
    (folder / "changed.keras").write_bytes(whole[:spot] + b"#" + whole[spot + 1 :])
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("data.csv", "1,2")
    (folder / "half.h5").write_bytes((folder / "whole.h5").read_bytes()[:3000])
    (folder / "renamed.h5").write_bytes((folder / "net.weights.h5").read_bytes())
    (folder / "net.txt").write_text("not a model")
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize("name", ["whole.keras", "folder", "whole.h5"])
def test_models(folder: Path, name: str) -> None:
    path = str(folder / name)
    models.check_name(path)
    assert models.load(path).count_params() == mlp().count_params()


WRONG = {
    "half.keras": r"half.keras is corrupt or was not written to its end \([\d,]+ bytes\)",
    "empty.keras": r"empty.keras is corrupt or was not written to its end \(0 bytes\)",
    "text.keras": "text.keras is corrupt or was not written to its end",
    "changed.keras": r"changed.keras is corrupt \(in config.json\)",
    "other.keras": "is no model of Keras 3: it has no config.json, metadata.json, model.weights.h5",
    "half.h5": "half.h5 is corrupt or was not written to its end .*truncated",
    "renamed.h5": "holds weights only",
    "net.weights.h5": "holds weights only",
    "net.txt": r"is no saved model: those end in .keras or .h5",
    "nothing": "is a folder without config.json",
    "lost.keras": "There is no such file, and no application of that name.*Xception",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=WRONG[name]):
        models.check_name(str(folder / name))
    with pytest.raises(CommandError, match=WRONG[name]):
        choose_model(None, str(folder / name))


def test_a_whole_file_that_keras_cannot_load(folder: Path) -> None:
    class Unknown(keras.layers.Layer):
        def call(self, x):
            return x

    path = str(folder / "own.keras")
    keras.Sequential([keras.Input((2,)), Unknown()]).save(path)
    models.check_name(path)
    with pytest.raises(ValueError, match=r"Keras cannot load .*own.keras: .*with --imports"):
        models.load(path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        models.load(path, ["no_such_module"])


@pytest.mark.parametrize(("argument", "flag"), [(None, None), ("a.keras", "b.keras")])
def test_one_model_is_expected(argument: str | None, flag: str | None) -> None:
    with pytest.raises(CommandError, match=r"Expected one model: .*--model="):
        choose_model(argument, flag)


def test_applications_have_names() -> None:
    assert choose_model("Xception", "Xception") == "Xception"


def test_where_results_cannot_be_written(tmp_path: Path) -> None:
    """Noticed before the work, not after it."""
    check_writable(tmp_path / "new" / "step.png", "--picture=step.png")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file", "--picture=file")
    for path in (tmp_path / "file" / "step.png", tmp_path / "new", Path("/proc/step.png")):
        with pytest.raises(CommandError, match=r"Cannot write .*Received: --picture=x\. Name a"):
            check_writable(path, "--picture=x")
