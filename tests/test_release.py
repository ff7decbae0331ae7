"""What a release says of itself is in one place each, and agrees."""

import configparser
import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import parallel_keras as pk

ROOT = Path(__file__).parents[1]


@functools.cache
def module(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def settings() -> configparser.ConfigParser:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    return settings


def test_the_version_is_written_once(settings: configparser.ConfigParser) -> None:
    assert settings["metadata"]["version"] == "attr: parallel_keras._version.__version__"
    versions = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == pk.__version__
    wheels = re.findall(r"parallel_keras-([\d.]+)-py3", (ROOT / "README.md").read_text())
    assert {*wheels} == {pk.__version__}


def test_the_long_description_has_no_relative_link(settings: configparser.ConfigParser) -> None:
    readme = (ROOT / "README.md").read_text()
    check_dist = module("tools/check_dist.py")
    relative = check_dist.relative_links(readme)
    assert relative  # They lead somewhere in a checkout.
    assert [link for link in relative if not (ROOT / link.partition("#")[0]).exists()] == []
    shown = module("setup.py").long_description(readme, "https://example.org/x")
    assert check_dist.relative_links(shown) == []
    assert "(https://example.org/x/blob/main/docs/semantics.md)" in shown
    assert "(https://example.org/x/raw/main/docs/plots/speed-up.svg)" in shown


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("[a](b.md)", "[a](https://x/blob/main/b.md)"),
        ("![a](b.svg)", "![a](https://x/raw/main/b.svg)"),
        ("[![a](b.svg)](c.md)", "[![a](https://x/raw/main/b.svg)](https://x/blob/main/c.md)"),
        ("[a](https://x.org) [b](#here) [c](mailto:x)", None),
    ],
)
def test_links_are_made_absolute(text: str, absolute: str | None) -> None:
    assert module("setup.py").long_description(text, "https://x") == (absolute or text)


def test_relative_links_are_found() -> None:
    text = '[a](b.md) ![c](d.svg) [e](https://x.org) [f](#g) <img src="h.png">'
    assert module("tools/check_dist.py").relative_links(text) == ["b.md", "d.svg", "h.png"]


def test_addresses_are_in_one_place(settings: configparser.ConfigParser) -> None:
    urls = dict(re.findall(r"^(\w+) = (\S+)$", settings["metadata"]["project_urls"], re.M))
    assert {"Documentation", "Source", "Issues"} <= {*urls}


def test_the_python_that_runs_is_declared(settings: configparser.ConfigParser) -> None:
    declared = re.findall(r"Python :: (3\.\d+)$", settings["metadata"]["classifiers"], re.M)
    assert f"3.{sys.version_info.minor}" in declared
