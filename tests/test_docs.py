"""Every Python block of the documentation runs, one page after the other, each in one namespace.

A block that cannot run here says so in its first line, `# Needs ...`: it is only compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract import AbstractCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

import parallel_keras as pk
from parallel_keras.commands import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# They need several machines: see test_recipes.py, with stand-ins, and test_namespaces_guide.py.
ELSEWHERE = {"multi-machine.md", "two_machines.md"}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Splits the CPU itself, which only a fresh process can.
OWN_PROCESS = {"start.md"}
MOST_UNRUN = 9
NEEDS = "# Needs "


class Runs(PythonEvaluator):
    def __call__(self, example: Example) -> None:
        if example.parsed.lstrip().startswith(NEEDS):
            compile(example.parsed, example.path, "exec")
        else:
            super().__call__(example)


def parse(page: Path) -> list[Example]:
    # A title may follow the language.
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<arguments>python)\b[^\n]*\n"))
    parser = AbstractCodeBlockParser([lexer], language="python", evaluator=Runs())
    return list(Sybil([parser]).parse(page).examples())


WITH_CODE = [page for page in PAGES if page.name not in ELSEWHERE and parse(page)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name in OWN_PROCESS:
        script = "\n".join(example.parsed for example in parse(page))
        done = subprocess.run(
            [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True,
            check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return
    for example in parse(page):
        example.evaluate()


def test_most_blocks_run() -> None:
    blocks = [example for page in WITH_CODE for example in parse(page)]
    unrun = [example for example in blocks if example.parsed.lstrip().startswith(NEEDS)]
    assert 0 < len(unrun) <= MOST_UNRUN < len(blocks) / 4


def test_every_public_name_is_documented() -> None:
    named = re.findall(
        r"^::: parallel_keras\.(?:[a-z_]+\.)?(\w+)$", (DOCS / "api.md").read_text(), re.M
    )
    assert {*pk.__all__} - {"__version__"} <= {*named}


def test_every_command_is_documented() -> None:
    page = (DOCS / "command_line.md").read_text()
    assert [name for name in COMMANDS if f"| `{name}" not in page] == []
