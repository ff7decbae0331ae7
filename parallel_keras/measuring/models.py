"""From the name of an application, or the path to a saved file, to a model."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import h5py
import keras

# What Keras puts into a .keras file.
_PARTS: Final = frozenset({"config.json", "metadata.json", "model.weights.h5"})


def applications() -> list[str]:
    """The names of the models in `keras.applications`.

    Example:
    >>> "Xception" in applications()
    True
    """
    return sorted(name for name in dir(keras.applications) if name[:1].isupper())


def check_name(name: str) -> None:
    """Whether there is a model of that name; of a file also whether it is whole.

    Args:
        name: String, a name in `applications()` or a path.

    Raises:
        ValueError: If it is neither, or no saved model.
    """
    if name in applications():
        return
    path = Path(name)
    if not path.exists():
        raise ValueError(
            "There is no such file, and no application of that name. "
            f"Received: model={name!r}. Expected: the path to a saved model, or one of "
            f"{', '.join(applications())}. Save a model with parallel.save('model.keras')."
        )
    problem = _problem(path)
    if problem:
        raise ValueError(
            f"{name} {problem}. Received: model={name!r}. Expected: what "
            "parallel.save('model.keras') writes. Save or copy it again."
        )


def load(name: str, imports: Sequence[str] = ()) -> keras.Model:
    """The model of that name, with random weights, or from that file.

    Args:
        name: String that `check_name` takes.
        imports: Names of modules to import first, for classes of the model. Defaults to none.

    Returns:
        The model.

    Raises:
        ValueError: If Keras cannot load it, or it does not know the shape of its inputs.
    """
    for module in imports:
        importlib.import_module(module)
    if name in applications():
        model: keras.Model = getattr(keras.applications, name)(
            weights=None, classifier_activation=None
        )
        return model
    try:
        model = keras.saving.load_model(name)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"Keras cannot load {name}: {said} If it has classes of your own, name their module "
            "with --imports."
        ) from error
    if not getattr(model, "inputs", None):
        raise ValueError(
            "Expected a Functional or Sequential model that knows the shape of its inputs. "
            f"Received: model={model.name!r} (of type {type(model).__name__}). "
            "Call it on keras.Input(...) and save keras.Model(inputs, outputs) instead."
        )
    return model


def _problem(path: Path) -> str:
    """What is wrong with a file, or an empty string."""
    if path.is_dir():
        lost = _PARTS - {each.name for each in path.iterdir()}
        return f"is a folder without {', '.join(sorted(lost))}" if lost else ""
    if path.name.endswith(".weights.h5"):
        return "holds weights only, not the model"
    if path.suffix == ".keras":
        return _problem_of_archive(path)
    if path.suffix in (".h5", ".hdf5"):
        return _problem_of_hdf5(path)
    return "is no saved model: those end in .keras or .h5"


def _problem_of_archive(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return f"is corrupt or was not written to its end ({path.stat().st_size:,} bytes)"
    try:
        with zipfile.ZipFile(path) as archive:
            bad, lost = archive.testzip(), _PARTS - {*archive.namelist()}
    except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        return f"is corrupt ({error})"
    if bad:
        return f"is corrupt (in {bad})"
    return f"is no model of Keras 3: it has no {', '.join(sorted(lost))}" if lost else ""


def _problem_of_hdf5(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            return "" if "model_config" in file.attrs else "holds weights only, not the model"
    except OSError as error:
        return f"is corrupt or was not written to its end ({error})"
