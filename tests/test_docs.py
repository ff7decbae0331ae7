"""Every Python block of the documentation runs as pasted: each page in a process with one CPU.

A block that cannot run here says so in its first line, `# Needs ...`: it is only compiled.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.abstract import AbstractCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

import parallel_keras as pk
from parallel_keras.commands import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# They need several machines: see test_recipes.py, with stand-ins, and test_namespaces_guide.py.
ELSEWHERE = {"multi-machine.md", "two_machines.md"}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MOST_UNRUN = 9
NEEDS = "# Needs "


def parse(page: Path) -> list[Example]:
    # A title may follow the language.
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<arguments>python)\b[^\n]*\n"))
    parser = AbstractCodeBlockParser([lexer], language="python", evaluator=lambda example: None)
    return list(Sybil([parser]).parse(page).examples())


def is_run(example: Example) -> bool:
    return not example.parsed.lstrip().startswith(NEEDS)


# What a newcomer pastes first is always run.
FIRST = {"README.md", "start.md"}
WITH_CODE = [page for page in PAGES if page.name not in ELSEWHERE and parse(page)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


# Printed after each block, so that one run of a page also tells what a single block says.
END = "--- end of block ---"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """What each block of a page prints; a page runs once."""

    @functools.cache
    def run(page: Path) -> list[str]:
        folder = tmp_path_factory.mktemp("page")
        script = folder / "page.py"
        lines = [f"{each.parsed}\nprint({END!r})\n" for each in parse(page) if is_run(each)]
        script.write_text("\n".join(lines))
        done = subprocess.run(
            [sys.executable, script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
            check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split(f"{END}\n")

    return run


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.name in FIRST else pytest.mark.slow, id=page.name)
        for page in WITH_CODE
    ],
)
def test_blocks_run(page: Path, printed: Callable[[Path], list[str]]) -> None:
    for example in parse(page):
        compile(example.parsed, example.path, "exec")
    assert len(printed(page)) == 1 + sum(map(is_run, parse(page)))


def test_most_blocks_run() -> None:
    blocks = [example for page in WITH_CODE for example in parse(page)]
    unrun = [example for example in blocks if not is_run(example)]
    assert 0 < len(unrun) <= MOST_UNRUN < len(blocks) / 4


def test_every_public_name_is_documented() -> None:
    """And what the page says can be had as `pk.` can be."""
    public = (DOCS / "api.md").read_text().partition("\n## ")[0]
    named = re.findall(r"^::: parallel_keras\.(\w+)$", public, re.M)
    assert sorted(named) == sorted({*pk.__all__} - {"__version__"})


def test_what_pages_call_by_pk_is_there() -> None:
    called = {name for page in PAGES for name in re.findall(r"\bpk\.(\w+)", page.read_text())}
    assert sorted(name for name in called if not hasattr(pk, name)) == []


def test_every_command_is_documented() -> None:
    page = (DOCS / "command_line.md").read_text()
    assert [name for name in COMMANDS if f"| `{name}" not in page] == []


def test_the_first_example_prints_what_the_readme_says(
    printed: Callable[[Path], list[str]],
) -> None:
    page = ROOT / "README.md"
    [expected] = re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert printed(page)[0] == expected
