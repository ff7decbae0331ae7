"""`python -m parallel_keras`: which command runs, with which flags and arguments."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import parallel_keras as pk
from parallel_keras.commands import COMMANDS

# One process for all cases: each start of TensorFlow takes seconds. The commands are made up, so
# that this says nothing on the real ones.
_RUN_ALL = """
import contextlib, io, json, sys, types
from absl import flags
from parallel_keras import __main__, commands

def none():
    print("ran", command.FLAG.value)

def one(model):
    print("ran", command.FLAG.value, model)

def many(count, script, *arguments):
    print("ran", command.FLAG.value, count, script, *arguments)

def code():
    return 7

def mended():
    raise commands.CommandError("Two\\n lines.")

def broken():
    raise KeyError("lost")

def stopped():
    raise KeyboardInterrupt

command = types.ModuleType("parallel_keras.commands.none", "What the command does.")
sys.modules["parallel_keras.commands.none"] = command
exec("from absl import flags; FLAG = flags.DEFINE_integer('flag', 0, 'Any number.')",
     command.__dict__)
for main in (none, one, many, code, mended, broken, stopped):
    module = types.ModuleType(f"parallel_keras.commands.{main.__name__}", command.__doc__)
    module.main = main
    sys.modules[module.__name__] = module
    commands.COMMANDS[main.__name__] = "One line."
command = types.SimpleNamespace(FLAG=command.FLAG)

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["parallel_keras", *arguments]
    flags.FLAGS["flag"].value = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            __main__.console()
        except SystemExit as end:
            code = end.code
    print("RESULT", json.dumps([code, out.getvalue(), err.getvalue()]))
"""

# Command line, exit code (None is 0), and what is written.
RUNS: list[tuple[list[str], Any, str]] = [
    (["none"], None, "ran 0\n"),
    (["none", "--flag=3"], None, "ran 3\n"),
    (["one", "net.keras"], None, "ran 0 net.keras\n"),
    (["one", "net.keras", "--flag", "3"], None, "ran 3 net.keras\n"),
    (["many", "2", "train.py"], None, "ran 0 2 train.py\n"),
    (["many", "--flag=3", "2", "train.py", "--flag=4", "--help", "--", "-h"], None,
     "ran 3 2 train.py --flag=4 --help -- -h\n"),
    (["code"], 7, ""),
]  # fmt: skip
FAILURES: list[tuple[list[str], int, str]] = [
    ([], 2, "Usage: python -m parallel_keras <command>"),
    (["nothing"], 2, "No such command. Expected: one of ['bench'"),
    (["none", "extra"], 1, "Expected: python -m parallel_keras none [flags]. Received: "
     "arguments=['extra']. See: python -m parallel_keras none --help"),
    (["one"], 1, "Expected: python -m parallel_keras one [flags] <model>. Received: arguments=[]"),
    (["many", "2"], 1, "many [flags] <count> <script> [arguments ...]. Received: arguments=['2']"),
    (["none", "--flog"], 1, "parallel_keras none: Unknown command line flag 'flog'"),
    (["mended"], 1, "parallel_keras mended: Two lines.\n"),
    (["broken"], 1, "parallel_keras broken: KeyError: 'lost' (To see where: "),
    (["stopped"], 128 + signal.SIGINT, "\nparallel_keras stopped: interrupted\n"),
]  # fmt: skip
HELP: list[tuple[list[str], str]] = [
    (["--help"], "\nCommands:\n  bench"),
    (["help"], "\nCommands:\n  bench"),
    (["--version"], f"parallel_keras {pk.__version__}\n"),
    (["one", "--help"], "Usage: python -m parallel_keras one [flags] <model>\n\nWhat the command"),
    (["one", "net.keras", "-h"], "What the command does."),
    (["many", "-h", "2"], "many [flags] <count> <script> [arguments ...]\n"),
]


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, ...], tuple[Any, str, str]]:
    """Returns the exit code and what was written, for each command line of this file."""
    lines = [each[0] for each in (*RUNS, *FAILURES, *HELP)]
    process = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    answers = [tuple(json.loads(line.removeprefix("RESULT "))) for line in found]
    return {tuple(line): answer for line, answer in zip(lines, answers, strict=True)}


@pytest.mark.parametrize(("line", "code", "written"), RUNS)
def test_runs(results: Any, line: list[str], code: int | None, written: str) -> None:
    assert results[tuple(line)] == (code, written, "")


@pytest.mark.parametrize(("line", "code", "written"), FAILURES)
def test_fails(results: Any, line: list[str], code: int, written: str) -> None:
    found, out, err = results[tuple(line)]
    assert (found, out) == (code, "")
    assert written in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("line", "written"), HELP)
def test_helps(results: Any, line: list[str], written: str) -> None:
    code, out, err = results[tuple(line)]
    assert (code, err) == (None, "")
    assert written in out


ASKED = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("program", ["module", "script"])
@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_help_does_not_wait_for_tensorflow(
    program: str, arguments: list[str], tmp_path: Path
) -> None:
    """Counted, not timed: TensorFlow takes seconds to import, and logs."""
    script = tmp_path / "parallel-keras"  # what pip makes of the entry point
    script.write_text("from parallel_keras.__main__ import console\nconsole()\n")
    started = {"module": ["-m", "parallel_keras"], "script": [str(script)]}[program]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *started, *arguments],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == []
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "absl.flags" in imported
    assert imported.isdisjoint({"tensorflow", "keras", "numpy", "h5py"})


def test_names_are_there_when_they_are_asked_for() -> None:
    """What the command line puts off is loaded by its first use, and no more is promised."""
    code = """
import sys
sys.argv = ["/bin/parallel-keras"]
import parallel_keras as pk
assert "keras" not in sys.modules
try:
    pk.nothing
except AttributeError as error:
    print(error)
print(*sorted(name for name in pk.__all__ if getattr(pk, name)))
import parallel_keras._public
print(pk.DataParallelModel is parallel_keras._public.DataParallelModel)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "module 'parallel_keras' has no attribute 'nothing'",
        " ".join(sorted(pk.__all__)),
        "True",
    ]


def test_who_has_read_enough_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "parallel_keras", "--help"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
