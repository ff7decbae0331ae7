"""The documentation as it is built: what a reader sees, not what its source says."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

# What pip finds for 3.10 does not fit together: newer releases of some parts have left it behind.
pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the documentation is built with Python 3.11 or newer"
)
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```+[^\n]*\n(.*?)^```+$", re.M | re.S)
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.M)


class Page(HTMLParser):
    """The code, the links, the pictures and the tables of a page, without menus."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.quotes = 0
        self.text = ""
        self._in_block = False
        self.feed(html.partition("<article")[2].partition("</article>")[0])

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "pre":
            self.blocks.append("")
            self._in_block = True
        elif tag == "blockquote":
            self.quotes += 1
        elif tag == "a":
            self.links.append(given.get("href") or "")
        elif tag == "img":
            self.images.append(given["src"])

    def handle_endtag(self, tag):
        self._in_block = self._in_block and tag != "pre"

    def handle_data(self, data):
        if self._in_block:
            self.blocks[-1] += data
        else:
            self.text += data


def place(page: Path) -> Path:
    """Where mkdocs writes a page."""
    return page.parent / "index.html" if page.stem == "index" else page.with_suffix("") / page.name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        page: Page((folder / place(page).with_name("index.html")).read_text()) for page in PAGES
    }


def squeezed(code: str) -> str:
    return "\n".join(line.rstrip() for line in code.strip().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_each_page_has_its_code(page: Path, site: dict[Path, Page]) -> None:
    """X: the page of examples showed an include marker in the place of each program."""
    shown = [squeezed(block) for block in site[page].blocks]
    for block in FENCE.findall((DOCS / page).read_text()):
        code = INCLUDE.sub(lambda match: (ROOT / match[1]).read_text().strip(), block)
        assert squeezed(code) in shown


def test_examples_are_programs(site: dict[Path, Page]) -> None:
    programs = sorted((DOCS / "examples").glob("*.py"))
    assert len(programs) > 5
    shown = "\n".join(site[Path("examples.md")].blocks)
    assert [path.name for path in programs if path.read_text().strip() not in shown] == []


def test_examples_of_docstrings_are_code(site: dict[Path, Page]) -> None:
    """Markdown takes `>>>` for three quotations in one another, and runs the lines together."""
    api = site[Path("api.md")]
    assert api.quotes == 0
    typed = [block for block in api.blocks if block.startswith(">>> ")]
    assert len(typed) > 3
    assert min(block.count("\n") for block in typed) > 1


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_nothing_is_left_of_the_markup(page: Path, site: dict[Path, Page]) -> None:
    """A table that is broken, or a marker that is not known, is shown as it was written."""
    left = re.findall(r"\|\s*---|^\s*\|.*\||8\s*<\s*-|```|\]\(|>>> ", site[page].text, re.M)
    assert left == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_pictures_lead_somewhere(page: Path, site: dict[Path, Page]) -> None:
    here = place(page).parent
    for target in (*site[page].links, *site[page].images):
        path = target.partition("#")[0]
        if path and "://" not in path:
            # Both kinds of page are folders to a browser, so that `..` leads up from either.
            found = os.path.normpath(here / path)
            known = {os.path.normpath(place(each).parent) for each in PAGES}
            assert found in known or (DOCS / found).is_file(), target


def test_each_page_is_linked_from_another(site: dict[Path, Page]) -> None:
    """A menu alone is not found: somebody reads a page and goes on from there."""
    linked = set()
    for page, seen in site.items():
        here = place(page).parent
        for target in seen.links:
            path = target.partition("#")[0]
            if (
                path
                and "://" not in path
                and os.path.normpath(here / path) != os.path.normpath(here)
            ):
                linked.add(os.path.normpath(here / path))
    names = {
        page: os.path.normpath(place(page).parent) for page in PAGES if page != Path("index.md")
    }
    assert [str(page) for page, name in names.items() if name not in linked] == []
