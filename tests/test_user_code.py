"""Whether it is known what code of the user's reads."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from parallel_keras.steps import python_state

FACTORS = {"by": 2.0}
SEEN: list[Any] = []
Held = type("Held", (), {})


def double(x: Any) -> Any:
    return x * FACTORS["by"]


def noting(x: Any) -> Any:
    SEEN.append(x)
    return x


def known(call: Callable[..., Any]) -> bool:
    """Whether a layer with this call can be known."""
    layer = type("Layer", (keras.layers.Layer,), {"call": call, "__module__": __name__})()
    return python_state.attributes(keras.Sequential([keras.Input((3,)), layer])) is not None


KNOWN: dict[str, Callable[..., Any]] = {
    "operations": lambda self, x: keras.ops.relu(x) * math.pi + np.float32(1),
    "helper": lambda self, x: double(x),
    "attributes": lambda self, x: x if self.trainable and len(x.shape) > 1 else -x,
    "comprehension": lambda self, x: sum(x * i for i in range(3)),
}
UNKNOWN: dict[str, Callable[..., Any]] = {
    "list": lambda self, x: noting(x),
    "time": lambda self, x: x + time.time(),
    "random": lambda self, x: x + random.random(),
    "numpy random": lambda self, x: x + np.random.rand(),  # noqa: NPY002
    "print": lambda self, x: print(x) or x,
    "class": lambda self, x: x * len(Held().__dict__),
    "setattr": lambda self, x: setattr(self, "last", x) or x,
    "loss": lambda self, x: x * getattr(self, "loss", 1.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_code_that_only_computes(name: str) -> None:
    assert known(KNOWN[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_code_that_may_do_more(name: str) -> None:
    assert not known(UNKNOWN[name])


def test_a_store_is_more() -> None:
    class Keeps(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.last = x
            return x

    assert not known(Keeps.call)


def test_what_is_read_is_compared() -> None:
    """X8: a global, a default, a variable around a function, an attribute of a class."""
    scale = 1.0

    class Reads(keras.layers.Layer):
        gain = 1.0

        @property
        def offset(self) -> float:
            return scale

        def call(self, x: Any, by: float = 1.0) -> Any:
            return double(x) * by + self.offset * self.gain

    model = keras.Sequential([keras.Input((3,)), Reads()])
    seen = [python_state.attributes(model)]
    assert seen[0] is not None
    assert python_state.attributes(model) == seen[0]

    def note() -> None:
        seen.append(python_state.attributes(model))
        assert seen[-1] is not None
        assert seen[-1] != seen[-2]

    FACTORS["by"] = 3.0
    note()
    scale = 2.0
    note()
    Reads.gain = 2.0
    note()
    Reads.call.__defaults__ = (2.0,)
    note()
    Reads.bias = 1.0
    note()
    Reads.call = lambda self, x: x
    note()
