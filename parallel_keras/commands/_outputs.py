"""Whether results can be written, asked before the work that they come from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from parallel_keras.commands import CommandError


def check_writable(path: Path, flag: str) -> None:
    """Makes the folder of a file, and writes to it, to see whether that works.

    Args:
        path: Where a file is to be written.
        flag: String, the flag that says so, as the user wrote it.

    Raises:
        CommandError: If the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "A folder of that name exists")
        if path.exists():
            with path.open("ab"):
                pass
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CommandError(
            f"Cannot write {path}: {error.strerror}. Received: {flag}. "
            "Name a folder that can be written to."
        ) from error
