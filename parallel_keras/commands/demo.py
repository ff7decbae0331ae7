"""Trains a small network on handwritten digits, once on one device and once on all of them.

It uses every GPU, or, where there is none, two logical CPUs. It prints how far the two runs are
apart and how long they took, saves the network through the wrapper as digits.keras, evaluates that
file in a process that cannot import parallel_keras, and draws demo.png. It fails if the two runs
differ by more than rounding, or if the file does not do as well as the network that was saved.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from absl import flags

from parallel_keras.commands import CommandError, _flags
from parallel_keras.commands._outputs import check_writable

_EPOCHS = flags.DEFINE_integer(
    "epochs",
    12,
    "How many epochs to train for; the first does not count for the time per epoch.",
    lower_bound=2,
)
_DEVICES = _flags.define_devices()
_JSON = _flags.define_json()
_OUTPUT_DIR = flags.DEFINE_string("output-dir", ".", "Where to write digits.keras and demo.png.")


def main() -> None:
    """Runs the demo."""
    _require_packages()
    folder = Path(_OUTPUT_DIR.value).absolute()
    model_file, picture = folder / "digits.keras", folder / "demo.png"
    for path in (model_file, picture):
        check_writable(path, f"--output-dir={_OUTPUT_DIR.value}")
    # These start TensorFlow.
    from parallel_keras.commands import digits
    from parallel_keras.commands.machine import choose_devices

    # With --json, what is for people goes to the other stream.
    with contextlib.redirect_stdout(sys.stderr if _JSON.value else sys.stdout):
        devices = choose_devices(_DEVICES.value)
        found = digits.compare(devices, _EPOCHS.value, model_file)
        print(f"\n{found}\nWritten: {model_file}", flush=True)
        found.draw(picture)
        print(f"Written: {picture}", flush=True)
    if _JSON.value:
        print(json.dumps(found.as_dict()))
    found.check()


def _require_packages() -> None:
    missing = [
        package
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise CommandError(
            f"The demo also needs {' and '.join(missing)}. Install: pip install {' '.join(missing)}"
        )
