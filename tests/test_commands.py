"""The commands as a user runs them: a process each, all of them at the same time.

Most are forks of one process, which has imported the library for all of them.
"""

import configparser
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from parallel_keras.measuring.random_batch import random_batch
from tests.parity import mlp

ENVIRONMENT = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
COMMANDS = {
    "devices": ["devices", "--check", "--json"],
    "table": ["devices"],
    "explain": ["explain", "net.keras", "--devices=2", "--batch-size=6", "--repeats=2", "--json",
                "--picture=step.png"],
    "missing": ["explain", "lost.keras"],
    "broken": ["explain", "broken.keras"],
    "not measured": ["bench", "broken.keras"],
    "no picture": ["explain", "net.keras", "--picture=step.keras"],
    "not written": ["explain", "net.keras", "--picture=broken.keras/step.png"],
    "not saved": ["demo", "--output-dir=broken.keras"],
}  # fmt: skip


FORKED = [name for name in COMMANDS if name not in ("devices", "explain")]
# Each fork has streams, arguments and an end of its own, as a process of its own has.
FORKS = """
import json, os, runpy, sys
import keras, tensorflow, parallel_keras.model
forks = []
for name, command in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    forks.append(os.fork())
    if not forks[-1]:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name} {stream}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv[1:] = command
        runpy.run_module("parallel_keras", run_name="__main__", alter_sys=True)
        sys.exit(0)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("commands")
    model = mlp()
    model.compile("adam", "mse")
    model.save(folder / "net.keras")
    (folder / "broken.keras").write_text("not a model")
    forked = {name: COMMANDS[name] for name in FORKED}
    programs = {
        name: ["-m", "parallel_keras", *command]
        for name, command in COMMANDS.items()
        if name not in FORKED
    } | {"forks": ["-c", FORKS, json.dumps(forked)]}
    processes = {
        name: subprocess.Popen(
            [sys.executable, *program],
            cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, program in programs.items()
    }  # fmt: skip
    done = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=500)
        done[name] = subprocess.CompletedProcess(programs[name], process.returncode, out, err)
    assert done["forks"].returncode == 0, done["forks"].stderr
    for name, code in zip(FORKED, json.loads(done["forks"].stdout), strict=True):
        out, err = ((folder / f"{name} {stream}").read_text() for stream in ("out", "err"))
        done[name] = subprocess.CompletedProcess(COMMANDS[name], code, out, err)
    done["folder"] = folder
    return done


def test_devices(results: Any) -> None:
    assert results["devices"].returncode == 0, results["devices"].stderr
    found = json.loads(results["devices"].stdout)
    assert [device["name"] for device in found["devices"]] == ["/device:CPU:0"]
    assert found["devices"][0]["use"] == "CPU:0"
    assert found["default"] == ["/device:CPU:0"]
    assert "CUDA_VISIBLE_DEVICES='-1' hides GPUs" in found["missing_gpus"][0]
    assert found["faults"] == []


def test_devices_as_a_table(results: Any) -> None:
    assert results["table"].returncode == 0, results["table"].stderr
    shown = results["table"].stdout
    assert f"Keras {keras.__version__}" in shown
    assert "DataParallelModel(model) uses: /device:CPU:0\n" in shown
    assert "Why there are not more GPUs: CUDA_VISIBLE_DEVICES='-1' hides GPUs" in shown


def test_explain(results: Any) -> None:
    assert results["explain"].returncode == 0, results["explain"].stderr
    found = json.loads(results["explain"].stdout)
    assert [tower["rows"] for tower in found["towers"]] == [3, 3]
    assert found["batch_size"] == 6
    assert found["step"] > 0
    assert min(numbers(found)) >= 0
    assert (results["folder"] / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "There is no such file"),
        ("broken", "broken.keras is corrupt or was not written to its end"),
        ("not measured", "broken.keras is corrupt or was not written to its end"),
        ("no picture", "There is no such kind of picture."),
        ("not written", "Cannot write "),
        ("not saved", "Cannot write "),
    ],
)
def test_errors_are_one_line(results: Any, name: str, words: str) -> None:
    assert results[name].returncode == 1
    assert results[name].stdout == ""
    last = results[name].stderr.splitlines()[-1]  # TensorFlow's log comes before it.
    assert last.startswith(f"parallel_keras {COMMANDS[name][0]}: {words}")
    assert "Traceback" not in results[name].stderr


def numbers(found: Any) -> list[float]:
    """All numbers in what JSON holds."""
    return [leaf for leaf in keras.tree.flatten(found) if isinstance(leaf, (int, float))]


@pytest.mark.slow
def test_few_epochs_of_the_demo_succeed(tmp_path: Path) -> None:
    """It is judged by its weights: two epochs reach no accuracy."""
    done = subprocess.run(
        [sys.executable, "-m", "parallel_keras", "demo", "--epochs=2", "--json"],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weight_difference"] < 1e-5
    assert min(numbers(found)) >= 0
    assert {path.name for path in tmp_path.iterdir()} == {"digits.keras", "demo.png"}


# What a shell starts with `&` ignores Ctrl-C, and so does all that it starts: tests, for one.
HEARS_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("parallel_keras", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="only POSIX sends Ctrl-C to one process")
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_ctrl_c_is_one_line(command: str, tmp_path: Path) -> None:
    arguments = {"demo": ["demo"], "bench": ["bench", "Xception"]}[command]
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *arguments],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline()  # It is at work.
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGINT
    assert err.splitlines()[-1] == f"parallel_keras {command}: interrupted"
    assert "Traceback" not in err


def test_console_script() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    script = setup["options.entry_points"]["console_scripts"].strip()
    assert script == "parallel-keras = parallel_keras.__main__:console"
    assert callable(importlib.import_module("parallel_keras.__main__").console)


def two_headed() -> keras.Model:
    pixels = keras.Input((4,), name="pixels")
    words = keras.Input((None,), dtype="int32", name="words")
    outputs = {
        "kind": keras.layers.Dense(2, activation="softmax")(pixels),
        "next": keras.layers.Embedding(5, 3)(words),
    }
    return keras.Model({"pixels": pixels, "words": words}, outputs)


def test_random_rows_fit_the_model() -> None:
    model = two_headed()
    losses = {"kind": "mse", "next": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile("sgd", loss=losses)
    x, y = random_batch(model, rows=3, open_size=5)
    assert x["pixels"].shape == (3, 4)
    assert x["pixels"].std() > 0
    assert x["words"].shape == (3, 5)
    assert set(np.unique(x["words"])) <= {0, 1}
    assert y["kind"].shape == (3, 2)
    np.testing.assert_array_equal(y["next"], np.zeros((3, 5)))
    model.train_on_batch(x, y)


def test_random_rows_for_a_list_of_losses() -> None:
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(2)(inputs), keras.layers.Dense(3)(inputs)]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss=["mse", "sparse_categorical_crossentropy"])
    _, (first, second) = random_batch(model, rows=3)
    assert first.shape == (3, 2)
    assert second.shape == (3,)
