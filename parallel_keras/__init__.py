"""Train a Keras model on all of your devices, with the same numbers as on one.

The public names are those in `__all__`; everything else is an implementation detail.
"""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

from parallel_keras._version import __version__

__all__ = [
    "DataParallelModel",
    "Explanation",
    "__version__",
    "check_workers",
    "connect",
    "explain",
    "load_multi_gpu_weights",
    "multi_gpu_model",
    "verify",
    "virtual_devices",
]


def _is_command_line() -> bool:
    """Whether this is the start of `python -m parallel_keras`, or of `parallel-keras`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # as long as Python looks for the module
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == __name__
    return pathlib.PurePath(program).stem == "parallel-keras"


if TYPE_CHECKING or not _is_command_line():
    # At once: importing also tells Keras of the classes that saved files may name.
    from parallel_keras._public import (
        DataParallelModel,
        Explanation,
        check_workers,
        connect,
        explain,
        load_multi_gpu_weights,
        multi_gpu_model,
        verify,
        virtual_devices,
    )
else:

    def __getattr__(name: str) -> Any:
        """Starts TensorFlow as late as can be, so that `--help` need not wait for it."""
        if name in __all__:
            from parallel_keras import _public

            return getattr(_public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
