"""Every Python block of the documentation runs as pasted: each page in a process with one CPU.

A block that cannot run here says so in its first line, `# Needs ...`: it is only compiled.
"""

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.name in FIRST else pytest.mark.slow, id=page.name)
        for page in WITH_CODE
    ],
)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    for example in parse(page):
        compile(example.parsed, example.path, "exec")
    script.write_text("\n".join(each.parsed for each in parse(page) if is_run(each)))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    [expected] = re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.M | re.S)
    first = next(each.parsed for each in parse(page) if is_run(each))
    done = subprocess.run(
        [sys.executable, "-c", first], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
        text=True, check=True, timeout=240,
    )  # fmt: skip
    assert done.stdout == expected
