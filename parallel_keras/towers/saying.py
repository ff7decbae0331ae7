"""What the log says while towers are traced: once about each layer or variable."""

from __future__ import annotations

import weakref
from typing import Any

from absl import logging

_SAID: set[tuple[int, str]] = set()


def warn_once(about: Any, message: str, *arguments: Any) -> None:
    """Logs a warning, unless the same was said about the same thing before.

    Towers are traced for each graph anew, and each time would say it again.

    Args:
        about: A layer, variable or model.
        message: String, as of `logging.warning`.
        *arguments: What is put into it.
    """
    key = id(about), message
    if key not in _SAID:
        _SAID.add(key)
        # Another one may get the same id later.
        weakref.finalize(about, _SAID.discard, key)
        logging.warning(message, *arguments)
