"""Starts runners and lets them take turns, so that all meet the same moods of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

from parallel_keras.measuring.clock import steps_for


class RunnerFailed(Exception):  # noqa: N818 (it is what happened, and `Error` would add nothing)
    """A runner ended before it was told to; the text is the last line that it wrote."""


class Asked(Protocol):
    """What can be asked to run some steps."""

    def ask(self, command: str, steps: int = 0) -> dict[str, Any]:
        """Runs a command and returns its answer."""


class Runner:
    """A process that trains one model.

    Args:
        module: The module that the process runs.
        spec: What it is to train, told to it as JSON.
        python: The Python that runs it. Defaults to this one.
    """

    def __init__(self, module: str, spec: Mapping[str, Any], python: str = sys.executable) -> None:
        # Not a pipe, which nobody would empty while the process works.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop())
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ},
            text=True,
        )
        self.start: dict[str, Any] = {}

    def __enter__(self) -> Runner:
        """Waits until the first step is done."""
        try:
            self.start = self._answer()
        except RunnerFailed:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the process."""
        self.stop()

    def ask(self, command: str, steps: int = 0) -> dict[str, Any]:
        """Has the runner run a command, and waits for its answer.

        Args:
            command: String, its name.
            steps: Int, how many steps to run.

        Returns:
            The answer.

        Raises:
            RunnerFailed: If the process ends instead.
        """
        with contextlib.suppress(BrokenPipeError):
            print(command, steps, file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        said = [text.strip() for text in self._errors if text.strip()]
        raise RunnerFailed(said[-1] if said else f"exit status {self._process.returncode}")


@contextlib.contextmanager
def runners(module: str, specs: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Runner]]:
    """Starts runners one after the other, so that none disturbs the first step of another."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Runner(module, spec)) for name, spec in specs.items()}


def take_turns(
    contenders: Mapping[str, Asked], command: str, rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Has each contender run some steps in each round.

    Args:
        contenders: Runners by name.
        command: String, `"train"` or `"predict"`.
        rounds: Int, how often.
        seconds: Float, about how long each one's turn is.

    Returns:
        For each name a dict of lists with an entry for each round: `seconds`, the median of the
        steps, and `cpu`, the seconds of CPU time that all threads together took for a step.
    """
    steps = {}
    for name, contender in contenders.items():
        warm_up = contender.ask(command, 3)["seconds"]
        steps[name] = steps_for(seconds, statistics.median(warm_up))
    results: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu": []} for name in contenders
    }
    for _ in range(rounds):
        for name, contender in contenders.items():
            answer = contender.ask(command, steps[name])
            results[name]["seconds"].append(statistics.median(answer["seconds"]))
            results[name]["cpu"].append(answer["cpu"])
    return results
