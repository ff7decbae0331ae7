"""The examples of the documentation learn something, at a small size."""

import importlib.util
from pathlib import Path
from types import ModuleType

import keras
import pytest

# Whole programs.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
# Runs only when started as several workers.
ELSEWHERE = {"several_machines"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = sorted({path.stem for path in FOLDER.glob("*.py")} - ELSEWHERE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    history = load(name).train(small=True, devices=3).history
    if name == "gan":  # The two take turns in winning.
        assert set(history) == {"discriminator", "generator"}
        return
    assert history["loss"][-1] < history["loss"][0]
