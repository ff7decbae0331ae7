"""docs/guides/two_machines.md, followed as it is written on two hosts; only addresses differ."""

import re
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.networks import Host
from tests.processes import ROOT, Program
from tests.test_namespaces_servers import START, network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = ROOT / "docs" / "guides" / "two_machines.md"


def blocks(heading: str) -> list[str]:
    """All blocks of code under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```(?:sh|python)[^\n]*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


class Machines:
    """The two machines of the guide, each with a folder."""

    def __init__(self, found: list[Host], folder: Path) -> None:
        self.found, self.folder = found, folder
        self.running: list[Program] = []

    def text(self, block: str) -> str:
        """With the addresses that the hosts here have."""
        for index, host in enumerate(self.found):
            block = block.replace(f"10.0.0.{index + 1}", host.ip)
        return block

    def run(self, index: int, command: str, **files: str) -> Program:
        folder = self.folder / str(index)
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(self.text(text))
        script = f"cd {folder} && PATH={Path(sys.executable).parent}:$PATH && {self.text(command)}"
        log = self.folder / f"{len(self.running)}.txt"
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [*self.found[index].prefix, "bash", "-ec", script]
        self.running.append(Program(command, log, quiet))
        return self.running[-1]


def losses(program: Program) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss: (\d\.\d+)", program.said)]


def losses_of_one_device() -> list[float]:
    keras.utils.set_random_seed(1)
    x, y = np.random.rand(1000, 20), np.random.rand(1000, 1)  # noqa: NPY002 (as in the guide)
    layers = [keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer="adam", loss="mse")
    return model.fit(x, y, batch_size=128, epochs=3, verbose=0).history["loss"]


def test_both_ways(tmp_path: Path) -> None:
    train, *on_each = blocks("3a")
    serve, use, start = blocks("3b")
    expected = losses_of_one_device()
    with network(2) as found:
        machines = Machines(found, tmp_path)
        try:
            workers = [machines.run(i, each, train=train) for i, each in enumerate(on_each)]
            for worker in workers:
                assert worker.wait(START) == 0, worker.said
                np.testing.assert_allclose(losses(worker), expected, atol=6e-5)  # 4 digits
            (tmp_path / "0" / "model.keras").unlink()
            assert not (tmp_path / "1" / "model.keras").exists()
            server = machines.run(1, f"exec {serve}")
            server.wait_for(f"Serving CPU:0 on {found[1].ip}:2222 to {found[0].ip}.", START)
            script = machines.run(0, start, use=use)
            assert script.wait(START) == 0, script.said
            np.testing.assert_allclose(losses(script), expected, atol=6e-5)
            assert (tmp_path / "0" / "model.keras").exists()
            server.send(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            for program in machines.running:
                program.end()
