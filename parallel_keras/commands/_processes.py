"""Several processes as one: their output is marked, and they end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Final

SIGNALLED: Final = 128
"""What shells add to the number of the signal that ended a process."""
_POLL: Final = 0.05


def say(message: str) -> None:
    """Writes a line that is not a worker's."""
    print(f"parallel_keras workers: {message}", file=sys.stderr, flush=True)


def run(command: Sequence[str], extra: Sequence[Mapping[str, str]], grace: float) -> int:
    """Runs a command several times at once, until all have ended or one has failed.

    When one fails, the others are told to end, and so are all when this process
    gets SIGINT (Ctrl-C) or SIGTERM: they get the same signal. Who still runs
    after the grace time, or at a second such signal, is killed.

    Args:
        command: Sequence of strings, what each process runs.
        extra: Sequence of mappings, one for each process: what it finds in its
            environment besides what is there already.
        grace: Float, seconds between the request to end and the end by force.

    Returns:
        Int, 0, or the exit code of the first that failed; 128 and the number of
        the signal if a signal ended it, or this process.
    """
    with _collecting_signals() as received:
        children: list[_Child] = []
        try:
            for index, each in enumerate(extra):
                children.append(_Child(index, command, {**os.environ, **each}))
            return _until_end(children, received)
        finally:
            _stop(children, received, grace)


class _Child:
    """One process.

    Args:
        index: Int, its number.
        command: Sequence of strings, what it runs.
        environment: Mapping, its environment.
    """

    def __init__(self, index: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = f"worker {index}"
        # A session of its own, so that signals also reach what the process starts, and so that
        # Ctrl-C reaches it once: through this process.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        pipes = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._readers = [
            threading.Thread(target=self._copy, args=pipe, daemon=True) for pipe in pipes
        ]
        for reader in self._readers:
            reader.start()

    def _copy(self, source: IO[bytes], target: IO[str]) -> None:
        with source:
            for line in source:
                text = line.decode(errors="replace").rstrip("\r\n")
                # A progress bar draws over its line again and again; its last state is what counts.
                text = text.rpartition("\r")[2]
                # Where nobody reads any more, the process must still be able to write.
                with contextlib.suppress(OSError):
                    target.write(f"[{self.name}] {text}\n")
                    target.flush()

    @property
    def code(self) -> int | None:
        """The exit code, negative after a signal; `None` while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Sends a signal to the process and to what it started."""
        # Once it was waited for, another process may have its number.
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self) -> None:
        """Waits for the end of the process, and for what it wrote."""
        self._process.wait()
        for reader in self._readers:
            # What it started may live on and keep the pipe open, so this cannot wait for ever.
            reader.join(timeout=1.0)


def _until_end(children: Sequence[_Child], received: Sequence[int]) -> int:
    """Waits for the first failure, for a signal, or for the end of all."""
    while True:
        if received:
            say(f"received {signal.Signals(received[0]).name}; stopping the workers")
            return SIGNALLED + received[0]
        codes = [child.code for child in children]
        for child, code in zip(children, codes, strict=True):
            if code:
                say(f"{child.name} failed with {_describe(code)}; stopping the others")
                return code if code > 0 else SIGNALLED - code
        if None not in codes:
            return 0
        time.sleep(_POLL)


def _stop(children: Sequence[_Child], received: Sequence[int], grace: float) -> None:
    """Ends those that still run: by a signal first, then by force."""
    signals = len(received)
    for child in children:
        child.signal(received[0] if received else signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(child.code is None for child in children):
        if time.monotonic() > deadline or len(received) > signals:
            say("some workers are still there; killing them")
            break
        time.sleep(_POLL)
    for child in children:
        child.signal(signal.SIGKILL)
    for child in children:
        child.wait()


def _describe(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


@contextlib.contextmanager
def _collecting_signals() -> Iterator[list[int]]:
    """Gives a list that grows with each SIGINT and SIGTERM, which do nothing else."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)

    before = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
