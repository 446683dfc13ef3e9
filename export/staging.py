"""A folder that appears whole or not at all.

It is written beside its final place and renamed there, so a process killed at any moment leaves the old
folder, or none. What a killed process leaves behind is removed by the next one that writes the same folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Stage:
    """Two empty folders: `content` is to become the output, `scratch` is removed with all that is in it."""

    content: Path
    scratch: Path


@contextmanager
def staged_folder(output: Path) -> Iterator[Stage]:
    """Yields a stage whose content replaces `output` when the block ends, or vanishes when it raises.

    The parent of `output` is created if missing. Raises OSError.
    """
    parent = output.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    folder, lock = _create_locked(output)
    try:
        stage = Stage(folder / "content", folder / "scratch")
        stage.content.mkdir()
        stage.scratch.mkdir()
        yield stage
        for path in sorted(stage.content.iterdir()):
            _sync(path)
        _sync(stage.content)
        _put_in_place(stage.content, output)
        _sync(parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _create_locked(output: Path) -> tuple[Path, int]:
    """A new temporary folder, and the lock that says its writer lives: unlike an id, it ends with it."""
    for attempt in itertools.count():
        folder = output.with_name(f"{_prefix(output)}{os.getpid()}-{attempt}")
        with suppress(FileExistsError, FileNotFoundError):
            folder.mkdir()
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink > 0:
                return folder, lock
            os.close(lock)  # another export took it for abandoned before it was locked
    raise AssertionError("unreachable")


def _remove_abandoned(output: Path) -> None:
    for folder in output.parent.iterdir():
        if not folder.name.startswith(_prefix(output)) or folder.is_symlink() or not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            pass  # its writer is at work
        finally:
            os.close(descriptor)


def _prefix(output: Path) -> str:
    return f".{output.name}.tmp-"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(content: Path, output: Path) -> None:
    """Leaves what was at `output` in the temporary folder."""
    if not output.exists():
        content.rename(output)
    elif not _exchange(content, output):
        replaced = content.with_name("replaced")
        try:
            output.rename(replaced)
            content.rename(output)
        except BaseException:
            if not output.exists():
                replaced.rename(output)
            raise


def _exchange(left: Path, right: Path) -> bool:
    """Swaps two folders in one step; False where the file system or the C library cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    status = renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
    return status == 0
