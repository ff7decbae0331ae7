"""Lets pip build the package; what it needs to know is in setup.cfg, but for this one thing."""

import configparser
import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def long_description(readme: str, source: str) -> str:
    """Makes the links and pictures of the README absolute, for pages that show it elsewhere.

    Args:
        readme: String, Markdown with links relative to the top of the repository.
        source: String, the address of the repository.

    Returns:
        The same text with absolute links.
    """
    elsewhere = r"(?![a-z]+:|#)"
    pictures = re.sub(rf"(!\[[^]]*\]\(){elsewhere}", rf"\g<1>{source}/raw/main/", readme)
    return re.sub(rf"(\]\(){elsewhere}", rf"\g<1>{source}/blob/main/", pictures)


def main() -> None:
    """Runs what pip asks for."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    addresses = settings["metadata"]["project_urls"].split()
    source = addresses[addresses.index("Source") + 2]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setuptools.setup(long_description=long_description(readme, source))


if __name__ == "__main__":
    main()
