"""Whole programs in the style of Keras' own examples, bare and on three devices."""

from __future__ import annotations

import pytest

from tests.programs import generative, text, vision
from tests.programs.program import TOWERS, Make, assert_same, run

FAMILIES = (text, generative, vision)


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=make.__name__) for family in FAMILIES for make in family.PROGRAMS],
)
def test_same_as_on_one_device(make: Make) -> None:
    assert_same(run(make), run(make, TOWERS))
