"""The recipes of docs/multi-machine.md, with stand-ins for what only a cluster has."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from parallel_keras.workers import cluster

# Each starts processes.
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "multi-machine.md"


def block(heading: str, language: str) -> str:
    """The first block of code in a language under a heading."""
    section = PAGE.read_text().split(f"# {heading}\n", 1)[1]
    found = re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_a_tf_config_that_kubeflow_writes() -> None:
    """See genTFConfigJSONStr in kubeflow/training-operator."""
    text = (
        '{"cluster":{"worker":["train-worker-0.ns.svc:2222","train-worker-1.ns.svc:2222"]},'
        '"task":{"type":"worker","index":1},"environment":"cloud"}'
    )
    assert str(cluster.read(text).own) == "worker 1 (train-worker-1.ns.svc:2222)"


def test_the_example_of_tf_config() -> None:
    text = block("TF_CONFIG", "json")
    found = cluster.read(text)
    assert cluster.write([task.address for task in found.tasks], found.rank) == text.strip()


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job script finds the hosts, and the lines in the script make a TF_CONFIG of them."""
    commands = {
        "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
        "srun": 'echo "$WORKER_HOSTS | $*"',
    }
    for name, text in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", "-eu", "-c", block("Slurm", "bash")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    hosts, command = done.stdout.strip().split(" | ")
    assert command == "--kill-on-bad-exit=1 python train.py"
    monkeypatch.setenv("WORKER_HOSTS", hosts)
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("TF_CONFIG", "")
    exec(block("Slurm", "python"), {})
    found = cluster.read(os.environ["TF_CONFIG"])
    assert [str(task) for task in found.tasks] == [
        "worker 0 (node7:23456)",
        "worker 1 (node8:23456)",
    ]
    assert found.rank == 1


def test_sagemaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_HOSTS", '["algo-2", "algo-1"]')
    monkeypatch.setenv("SM_CURRENT_HOST", "algo-2")
    monkeypatch.setenv("TF_CONFIG", "")
    exec(block("SageMaker", "python"), {})
    found = cluster.read(os.environ["TF_CONFIG"])
    assert [str(task) for task in found.tasks] == [
        "worker 0 (algo-1:8890)",
        "worker 1 (algo-2:8890)",
    ]
    assert found.rank == 1


def test_first_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of the page on two workers, by the launcher, beside the bare model alone."""
    text = block("First try, on one machine", "python")
    (tmp_path / "train.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "parallel_keras", "workers", "2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PAGE.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    trained = keras.saving.load_model(tmp_path / "model.keras")

    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.chdir(alone)
    wrapped = "pk.DataParallelModel(model, strategy=strategy)"
    strategy = "tf.distribute.MultiWorkerMirroredStrategy()"
    assert wrapped in text
    assert strategy in text
    names: dict[str, Any] = {}
    exec(text.replace(wrapped, "model").replace(strategy, "None"), names)
    for worker in range(2):
        marked = [
            line for line in done.stdout.splitlines() if line.startswith(f"[worker {worker}]")
        ]
        losses = [float(found) for found in re.findall(r"loss: ([\d.]+)", "\n".join(marked))]
        # Printed with 4 digits.
        np.testing.assert_allclose(losses, names["model"].history.history["loss"], atol=1e-4)
    for one, other in zip(names["model"].variables, trained.variables, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-5, atol=2e-6)
    for one, other in zip(
        names["model"].optimizer.variables, trained.optimizer.variables, strict=True
    ):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-5, atol=2e-6)
