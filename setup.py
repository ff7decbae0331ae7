"""Lets pip build the package; everything it needs to know is in setup.cfg."""

import setuptools

setuptools.setup()
