"""Tests of what older versions of Keras do not have."""

from __future__ import annotations

import functools

import keras
import pytest


def has(name: str) -> bool:
    """Whether this Keras has something.

    Args:
        name: String, its path in `keras`, such as `"optimizers.Muon"`.
    """
    found = functools.reduce(lambda held, part: getattr(held, part, None), name.split("."), keras)
    return found is not None


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where this Keras does not have something.

    Args:
        name: String, as of `has`.
    """
    return pytest.mark.skipif(not has(name), reason=f"keras.{name} came later")


def since(version: str, why: str) -> pytest.MarkDecorator:
    """Skips a test where Keras is older.

    Args:
        version: String, such as `"3.9"`.
        why: String, what it could not do before.
    """
    asked, found = (tuple(map(int, v.split(".")[:2])) for v in (version, keras.__version__))
    return pytest.mark.skipif(found < asked, reason=f"before Keras {version}: {why}")
