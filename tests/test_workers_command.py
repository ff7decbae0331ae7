"""`python -m parallel_keras workers`: starts workers, marks their output, ends them together.

User problem W4: https://github.com/tensorflow/tensorflow/issues/39041. The scripts are tiny and do
not import TensorFlow.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from parallel_keras.commands import CommandError, _processes, workers
from parallel_keras.workers import cluster

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the text of a script as two workers; it finds its number in `index`."""

    def run_script(text: str, grace: float = 60.0, count: int = 2) -> int:
        script = tmp_path / "script.py"
        head = "import os, signal, subprocess, sys, time\nindex = int(os.environ['INDEX'])\n"
        script.write_text(head + textwrap.dedent(text))
        extra = [{"INDEX": str(i), "PYTHONUNBUFFERED": "1"} for i in range(count)]
        return _processes.run([sys.executable, "-S", str(script), str(tmp_path)], extra, grace)

    return run_script


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"never written: {paths}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to notice its end does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def send(number: int, *, times: int = 1, after: tuple[Path, ...]) -> threading.Thread:
    """Sends a signal to this process, as a terminal does at Ctrl-C, once the files exist."""

    def kill() -> None:
        wait_for(*after)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_output_is_marked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        r"""
        print("one\ntwo")
        print("\b\b\r1/2", end="")
        print("\b\b\b\r2/2")
        print("to stderr", file=sys.stderr)
        sys.stdout.buffer.write(b"\xff ")
        print("no end of line", end="")
        """
    )
    out, err = capsys.readouterr()
    assert code == 0
    for index in range(2):
        mark = f"[worker {index}] "
        mine = [line.removeprefix(mark) for line in out.splitlines() if line.startswith(mark)]
        assert mine == ["one", "two", "2/2", "\N{REPLACEMENT CHARACTER} no end of line"]
    assert sorted(err.splitlines()) == ["[worker 0] to stderr", "[worker 1] to stderr"]


def test_output_comes_at_once(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """And what was said before a worker is killed is not lost."""
    seen = tmp_path / "seen"

    class Target(io.StringIO):
        def write(self, text: str) -> int:
            seen.write_text(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Target())
    code = run(
        """
        print("hello")
        while not os.path.exists(sys.argv[1] + "/seen"):
            time.sleep(0.01)
        """,
        count=1,
    )
    assert (code, seen.read_text()) == (0, "[worker 0] hello\n")


def test_nobody_reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`... | head` must not make a worker wait for ever."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run("for line in range(100):\n    print('.' * 10000)") == 0


def test_the_first_failure_ends_all(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a worker started itself; the exit code is that of the first."""
    code = run(
        """
        if index == 1:
            while not os.path.exists(sys.argv[1] + "/child"):
                time.sleep(0.01)
            sys.exit(3)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
        for name, pid in (("new", child.pid), ("parent", os.getpid())):
            with open(f"{sys.argv[1]}/{name}", "w") as file:
                file.write(str(pid))
        os.rename(sys.argv[1] + "/new", sys.argv[1] + "/child")
        time.sleep(3600)
        """
    )
    assert code == 3
    assert "worker 1 failed with exit code 3; stopping the others" in capsys.readouterr().err
    assert not is_alive(int((tmp_path / "parent").read_text()))
    deadline = time.monotonic() + 50  # Nobody waits for a grandchild, so it ends when it ends.
    while is_alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_does_not_end_is_killed_after_the_grace_time(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    code = run(
        """
        if index == 0:
            while not os.path.exists(sys.argv[1] + "/deaf"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(sys.argv[1] + "/new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + "/new", sys.argv[1] + "/deaf")
        time.sleep(3600)
        """,
        grace=0.5,
    )
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - start > 0.5
    err = capsys.readouterr().err
    assert "worker 0 failed with signal SIGKILL; stopping the others" in err
    assert "some workers are still there; killing them" in err
    assert not is_alive(int((tmp_path / "deaf").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    sender = send(number, after=(tmp_path / "ready0", tmp_path / "ready1"))
    code = run(
        """
        def end(number, frame):
            print("got", signal.Signals(number).name)
            sys.exit()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        open(f"{sys.argv[1]}/ready{index}", "w").close()
        time.sleep(3600)
        """
    )
    sender.join()
    assert code == 128 + number
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [f"[worker {i}] got {number.name}" for i in range(2)]
    assert f"received {number.name}; stopping the workers" in err
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_kills(run: Run, tmp_path: Path) -> None:
    ready = (tmp_path / "ready0", tmp_path / "ready1")
    sender = send(signal.SIGINT, times=2, after=ready)
    code = run(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        open(f"{sys.argv[1]}/ready{index}", "w").close()
        time.sleep(3600)
        """
    )
    sender.join()
    assert code == 128 + signal.SIGINT


def test_what_a_worker_cannot_start_with(tmp_path: Path) -> None:
    """Those that are there already are ended."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(3600)"]
    with pytest.raises(ValueError, match="null byte"):
        _processes.run(command, [{}, {"NAME": "\0"}], grace=60)


def test_each_worker_gets_its_tf_config() -> None:
    found = [cluster.read(each[cluster.VARIABLE]) for each in workers.environments(3)]
    assert [each.rank for each in found] == [0, 1, 2]
    assert len({each.tasks for each in found}) == 1
    assert len({task.address for task in found[0].tasks}) == 3
    assert {task.host for task in found[0].tasks} == {"127.0.0.1"}


def test_gpus_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As two workers on one GPU would each take all of its memory."""

    def visible(count: int) -> list[str | None]:
        return [each.get("CUDA_VISIBLE_DEVICES") for each in workers.environments(count)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(2) == [None, None]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * 5)
    assert visible(2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    assert visible(2) == ["7,6", "5,4"]
    assert capsys.readouterr().err == ""
    assert visible(6) == [""] * 6
    assert "6 workers and 5 GPU(s): all run on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "two", "", "1.5"])
def test_the_number_of_workers(count: str) -> None:
    with pytest.raises(CommandError, match=rf"number of workers first.*Received: count='{count}'"):
        workers.main(count, __file__)


def test_the_script_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"path of a Python script. Received: script='nothing'"):
        workers.main("2", "nothing")


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "java")
    with pytest.raises(CommandError, match=r"process groups.*os.name='java'"):
        workers.main("2", __file__)


def test_the_whole_command(tmp_path: Path) -> None:
    """What follows the script is the script's, also if it looks like a flag of the launcher."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        "print(index, *sys.argv[1:])\n"
        "sys.exit(4 * index)\n"
    )
    arguments = ["--grace=0", "--help", "a b", "--", "-h"]
    done = subprocess.run(
        [sys.executable, "-m", "parallel_keras", "workers", "--grace=60", "2", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 4
    expected = "--grace=0 --help a b -- -h"
    assert "[worker 1] 1 " + expected in done.stdout
    assert "worker 1 failed with exit code 4" in done.stderr
