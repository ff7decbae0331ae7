"""Runs tests with many versions of Python, TensorFlow and Keras, and writes what passed.

Each row of `ROWS` is one combination. Environments are kept in .venv-versions/, one for each Python
and TensorFlow; only Keras is exchanged in them. The table in docs/versions.md gets a line for each
row that ran; lines of rows that did not run stay as they are.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

_ONLY = flags.DEFINE_list("only", [], "Numbers of rows, as in the table; by default, all of them.")
_TESTS = flags.DEFINE_list(
    "tests", ["parity", "files", "citizen"], "What to run: tests/test_<name>.py of each."
)
_SIDE_BY_SIDE = flags.DEFINE_integer("processes", 2, "How many tests run at a time.", lower_bound=1)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
TABLE = re.compile(r"(<!-- versions -->\n)(.*?)(<!-- /versions -->)", re.S)


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination: a Python, and what pip is asked for."""

    python: str
    tensorflow: str
    keras: str


# The oldest of all, each minor version of Keras with the newest TensorFlow that takes it, and each
# Python with the newest of both: Keras after 3.12 needs Python 3.11.
ROWS = (
    Row("3.10", "2.16.2", "3.8.0"),
    Row("3.11", "2.19.*", "3.8.*"),
    Row("3.11", "2.19.*", "3.9.*"),
    Row("3.11", "2.20.*", "3.10.*"),
    Row("3.11", "2.20.*", "3.11.*"),
    Row("3.11", "2.21.*", "3.12.*"),
    Row("3.11", "2.21.*", "3.13.*"),
    Row("3.11", "2.21.*", "3.14.*"),
    Row("3.11", "2.21.*", "3.15.*"),
    Row("3.10", "2.21.*", "3.12.*"),
    Row("3.12", "2.21.*", "3.15.*"),
    Row("3.13", "2.21.*", "3.15.*"),
)


def python_of(version: str) -> str | None:
    """A Python of that version, if this machine has one."""
    for name in (f"python{version}", sys.executable, "python3"):
        path = shutil.which(name)
        # What lies on the path may be a stand-in that does not run.
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        if path and _output([path, "-c", asked]) == version:
            return path
    return None


def environment(row: Row, python: str) -> Path:
    """The Python of an environment with what the row asks for."""
    folder = ROOT / ".venv-versions" / f"{row.python}-{row.tensorflow.removesuffix('.*')}"
    found = folder / "bin" / "python"
    if not found.exists():
        _must([python, "-m", "venv", str(folder)])
    wanted = [f"tensorflow=={row.tensorflow}", f"keras=={row.keras}"]
    _must([str(found), "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[test]", *wanted])
    return found


def try_out(row: Row) -> tuple[str, str, str]:
    """Runs the tests of a row: the versions that were found, how it ended, and when."""
    python = python_of(row.python)
    if python is None:
        return "", "not run: no such Python here", ""
    try:
        found = str(environment(row, python))
    except subprocess.CalledProcessError as error:
        return "", f"pip failed: {error}", ""
    versions = "import importlib.metadata as m, platform as p; print(p.python_version(), "
    versions += "m.version('tensorflow'), m.version('keras'))"
    tests = [f"tests/test_{name}.py" for name in _TESTS.value]
    side_by_side = ["-n", str(_SIDE_BY_SIDE.value), "--dist", "loadfile"]
    command = [found, "-m", "pytest", "-q", "-p", "no:cacheprovider", *side_by_side, *tests]
    done = subprocess.run(command, cwd=ROOT, text=True, check=False, stdout=subprocess.PIPE)
    print(done.stdout, flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    ended = re.sub(r" in [\d.]+s.*| in [\d:. ()s]+$", "", last)
    return (
        _output([found, "-c", versions]),
        ended,
        dt.datetime.now(dt.timezone.utc).date().isoformat(),
    )


def fill(page: str, results: dict[int, tuple[str, str, str]]) -> str:
    """Puts results into the table of a page, and leaves its other lines as they are."""
    match = TABLE.search(page)
    if match is None:
        raise ValueError(f"Expected a table between marks. Received: {PAGE}")
    cells = re.findall(r"^\| (\d+) \|(.*)$", match[2], re.M)
    lines = {int(number): f"| {number} |{rest}" for number, rest in cells}
    for number, (found, ended, date) in results.items():
        row = ROWS[number - 1]
        asked = f"{row.python} {row.tensorflow} {row.keras}"
        python, tensorflow, keras = (found or asked).split()
        lines[number] = f"| {number} | {python} | {tensorflow} | {keras} | {ended} | {date} |"
    head = "\n| row | Python | TensorFlow | Keras | result | date |\n|---:|---|---|---|---|---|\n"
    table = head + "\n".join(lines[number] for number in sorted(lines)) + "\n\n"
    return page[: match.start(2)] + table + page[match.end(2) :]


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _must(command: Sequence[str]) -> None:
    logging.info("%s", " ".join(command))
    subprocess.run(command, check=True)


def main(argv: Sequence[str]) -> int:
    """Runs the rows; fails if one of them did."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected no arguments. Received: {list(argv[1:])}.")
    numbers = [int(number) for number in _ONLY.value] or range(1, len(ROWS) + 1)
    ended = {}
    for number in numbers:
        ended[number] = try_out(ROWS[number - 1])
        PAGE.write_text(fill(PAGE.read_text(), {number: ended[number]}))
        print(f"row {number}: {ended[number]}", flush=True)
    good = [number for number, (_, how, _) in ended.items() if re.fullmatch(r"\d+ passed.*", how)]
    bad = [number for number in ended if number not in good or "failed" in ended[number][1]]
    print(f"{len(ended) - len(bad)} of {len(ended)} rows passed" + f"; not: {bad}" * bool(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    app.run(main)
