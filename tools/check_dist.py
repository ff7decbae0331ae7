"""Checks what `make dist` built, as those meet it who have nothing but the files.

The wheel is installed into a new environment outside of the checkout, and used there; the sdist is
unpacked, and tests of it run from there.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

_DIST = flags.DEFINE_string("dist", "dist", "The folder with the wheel and the sdist.")

ROOT = Path(__file__).parents[1]
# Markdown, and the few places where HTML may stand in it.
LINK = re.compile(r"\]\(([^)\s]+)|(?:href|src)=\"([^\"]+)")
SMOKE = """
import keras
import numpy as np
import parallel_keras as pk

devices = pk.virtual_devices(3)
x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
y = x.sum(axis=1, keepdims=True)
parallel = pk.DataParallelModel(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
parallel.compile(keras.optimizers.SGD(0.1), "mse")
losses = parallel.fit(x, y, batch_size=16, epochs=5, verbose=0).history["loss"]
assert losses[-1] < losses[0], losses
parallel.save("net.keras")
loaded = keras.saving.load_model("net.keras")
np.testing.assert_allclose(loaded.predict(x), parallel.predict(x), rtol=1e-5, atol=1e-6)
again = pk.DataParallelModel(loaded, devices[:2])
again.fit(x, y, batch_size=16, verbose=0)
assert again.optimizer.iterations == 24
print("smoke test passed:", pk.__version__, pk.__file__)
"""


def relative_links(text: str) -> list[str]:
    """The links of a Markdown text that lead nowhere once it is shown elsewhere."""
    found = [markdown or html for markdown, html in LINK.findall(text)]
    return [link for link in found if not re.match(r"[a-z]+:|#", link)]


def only(folder: Path, pattern: str) -> Path:
    """The one file of that name."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise app.UsageError(f"Expected one {pattern} in {folder}. Received: {found}. make dist")
    return found[0]


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Runs a command where nothing of the checkout is near; returns what it printed."""
    logging.info("%s", " ".join(map(str, command)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, text=True, check=False,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed with {done.returncode}: {command}")
    return done.stdout


def check_description(wheel: Path) -> None:
    """The page that a package index would show."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    description = str(email.message_from_string(text).get_payload())
    if len(description) < 1000:
        raise SystemExit(f"The wheel has no long description: {description!r}")
    if found := relative_links(description):
        raise SystemExit(f"Relative links in the long description: {found}")
    print(f"description: {len(description)} characters, {len(LINK.findall(description))} links")


def check_wheel(wheel: Path, folder: Path) -> None:
    """Installs it, runs the demo and a smoke test."""
    venv.create(folder / "env", with_pip=True)
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    run([scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[demo]"], folder)
    print(run([scripts / "parallel-keras", "--version"], folder), end="")
    print(run([scripts / "parallel-keras", "devices"], folder))
    print(run([scripts / "python", "-c", SMOKE], folder).splitlines()[-1])
    shown = run([scripts / "parallel-keras", "demo", "--output-dir=results"], folder)
    print(shown[shown.index("\n\n") :].strip() if "\n\n" in shown else shown)
    for name in ("digits.keras", "demo.png"):
        only(folder / "results", name)


def check_sdist(sdist: Path, folder: Path) -> None:
    """Collects all its tests, and runs those that need files from outside of tests/."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    top = only(folder, "parallel_keras-*")
    shown = run([sys.executable, "-m", "pytest", "--collect-only", "-q"], top)
    print("sdist:", shown.strip().splitlines()[-1])
    tests = ["tests/test_site.py", "tests/test_old_weights.py", "tests/test_release.py"]
    shown = run([sys.executable, "-m", "pytest", "-q", *tests], top)
    print("sdist:", shown.strip().splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    """Checks both files."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected no arguments. Received: {list(argv[1:])}.")
    folder = Path(_DIST.value).absolute()
    wheel, sdist = only(folder, "*.whl"), only(folder, "*.tar.gz")
    check_description(wheel)
    with tempfile.TemporaryDirectory() as outside:
        check_sdist(sdist, Path(outside))
        check_wheel(wheel, Path(outside))


if __name__ == "__main__":
    app.run(main)
