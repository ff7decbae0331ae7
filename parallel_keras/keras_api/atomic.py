"""Files that are written whole or not at all. Pure: knows nothing of models."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[str]:
    """Gives a path to write to; what was written then takes the target's place.

    A write that fails, or a process that is killed in the middle of one, leaves
    what was there before. The path lies in a hidden folder beside the target, so
    that the last step is a rename, which file systems do at once or not at all.
    If a killed process left such a folder, the next write of the same target by
    this machine removes it.

    A folder that exists already is not replaced, because it may hold other things:
    the new files take the places of the old ones in it, one after the other.

    Args:
        target: Path of the file or folder. Links are followed. Missing folders
            above it are made.

    Yields:
        The path to write to: of the same name, and it does not exist yet.
        Whatever else is written beside it is moved too.

    Example:
    >>> import pathlib, tempfile
    >>> from parallel_keras.keras_api import atomic
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic.atomic_path(target) as path:
    ...     _ = pathlib.Path(path).write_text("1 2 3")
    ...     target.exists()
    False
    >>> target.read_text()
    '1 2 3'
    """
    final = Path(os.path.realpath(target))
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.{platform.node()}."
    _remove_leftovers(final.parent, prefix)
    folder = final.parent / f"{prefix}{os.getpid()}.saving"
    folder.mkdir()
    try:
        yield str(folder / final.name)
        for path in sorted(folder.iterdir()):
            _move(path, final.parent / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(path: Path, final: Path) -> None:
    if path.is_dir() and final.is_dir():
        for inner in sorted(path.iterdir()):
            _move(inner, final / inner.name)
        return
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            _flush(file)
    path.replace(final)


def _flush(file: Path) -> None:
    """Puts a file on the disk: a rename may get there before what is renamed."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for left in parent.glob(f"{glob.escape(prefix)}*.saving"):
        process = left.name.removeprefix(prefix).removesuffix(".saving")
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether another process of this machine has that number."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # Elsewhere the call below would end that process.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
