"""Starts worker processes on loopback, waits for them for a bounded time, ends what it started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel_keras.workers import cluster

ROOT = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Program:
    """A process that writes into a log.

    Args:
        command: What it runs.
        log: Path of the log.
        environment: Variables that it has besides those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        ours = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as written:
            self._process = subprocess.Popen(
                command,
                env=os.environ | ours | environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout)

    def wait_for(self, text: str, timeout: float) -> None:
        """Returns when the log has a text."""
        deadline = time.monotonic() + timeout
        while text not in self.said:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"No {text!r} in {self.log}:\n{self.said[-3000:]}")
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(20)


class Process(Program):
    """One worker.

    Args:
        module: Name of the module that it runs.
        settings: What the module is told.
        addresses: Those of all workers.
        index: Which of them it is.
        prefix: Command that it runs under. Defaults to none.
    """

    def __init__(
        self,
        module: str,
        settings: dict[str, Any],
        addresses: Sequence[str],
        index: int,
        prefix: Sequence[str] = (),
    ) -> None:
        self.address = addresses[index]
        super().__init__(
            [*prefix, sys.executable, "-m", module, json.dumps(settings)],
            Path(settings["folder"]) / f"log_{index}.txt",
            {"TF_CONFIG": cluster.write(addresses, index)},
        )


@contextlib.contextmanager
def started(
    module: str, settings: dict[str, Any], workers: int, towers: Sequence[int] | None = None
) -> Iterator[list[Process]]:
    """Runs workers, and ends them in any case."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(workers):
            own = settings if towers is None else settings | {"towers": towers[index]}
            process = Process(module, own, addresses, index)
            stack.callback(process.end)
            processes.append(process)
        yield processes
