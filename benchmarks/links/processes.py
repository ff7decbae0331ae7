"""Processes in namespaces, and what they are asked to do.

TensorFlow takes seconds to import, and a laboratory of eight devices starts dozens of processes.
So one process imports it, and all others are forked from that one, before TensorFlow has started
anything that a fork would break.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.links import namespaces

CONTENDERS = "benchmarks.links.contenders"
# Of the longest step that is measured here, and of the first one, that is many times enough.
PATIENCE = 400.0
_LAST_LINES = 25
_PR_SET_PDEATHSIG = 1


class ProcessFailed(Exception):  # noqa: N818 (it is what happened)
    """A process of the laboratory failed; the text is what it said."""


def context() -> multiprocessing.context.BaseContext:
    """Where processes come from."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([CONTENDERS])
    return made


class Process:
    """A process in a namespace.

    Args:
        namespace: String, its name.
        role: String, the function of `CONTENDERS` that it runs.
        spec: What that function is told.
    """

    def __init__(self, namespace: str, role: str, spec: Mapping[str, Any]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="links-", suffix=".txt")  # noqa: SIM115
        self.name = f"{role} in {namespace}"
        fork = context()
        self._pipe, other = fork.Pipe()
        self._process = fork.Process(
            target=_main, args=(namespace, role, dict(spec), self._log.name, other), daemon=True
        )
        self._process.start()
        other.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def send(self, command: str, number: int = 0) -> None:
        """Has the process run a command."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send((command, number))

    def answer(self) -> Any:
        """Waits for the answer to the oldest command that has none.

        Raises:
            ProcessFailed: If the process fails, ends or takes too long.
        """
        if not self._pipe.poll(PATIENCE):
            raise ProcessFailed(f"No answer from the {self.name} in {PATIENCE} s.\n{self.said()}")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise ProcessFailed(f"The {self.name} ended.\n{self.said()}") from None
        if isinstance(answer, dict) and "failure" in answer:
            raise ProcessFailed(f"The {self.name} failed.\n{answer['failure']}\n{self.said()}")
        return answer

    def said(self) -> str:
        """The last lines that it wrote."""
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])

    def stop(self) -> None:
        """Ends the process."""
        self._pipe.close()
        # TensorFlow's servers and strategies do not end by themselves.
        self._process.kill()
        self._process.join()
        self._log.close()


def ask_all(processes: Sequence[Process], command: str, number: int = 0) -> list[Any]:
    """Has all run a command at the same time.

    Returns:
        Their answers.
    """
    for process in processes:
        process.send(command, number)
    waiting = {process._pipe: index for index, process in enumerate(processes)}
    answers: list[Any] = [None] * len(processes)
    while waiting:
        # One that failed is the cause why others wait: it must be heard first.
        for pipe in connection.wait(list(waiting), PATIENCE) or list(waiting):
            index = waiting.pop(pipe)
            answers[index] = processes[index].answer()
    return answers


def _main(
    namespace: str, role: str, spec: dict[str, Any], log: str, pipe: connection.Connection
) -> None:
    _end_with_parent()
    namespaces.enter(namespace)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        commands = getattr(importlib.import_module(CONTENDERS), role)(spec)
        pipe.send({})
        while True:
            command, number = pipe.recv()
            pipe.send(commands[command](number))
    except EOFError:
        pass
    except Exception:  # noqa: BLE001 (the laboratory says what it was)
        with contextlib.suppress(BrokenPipeError):
            pipe.send({"failure": traceback.format_exc()})
    os._exit(0)


def _end_with_parent() -> None:
    """Has the kernel end this process when the one that it was forked from is gone.

    That one ends with the laboratory; a process that waits for others would not notice.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
