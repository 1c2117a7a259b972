"""Labs that end with the process which made them, also where that is killed: its daemon goes by itself, and the folder
is swept up by the next process that makes one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from db.lab import lock_file
from db.processes import FileLock, is_locked

PREFIX = "blueberry-reproduce-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for a lab that is deleted in the end; those that killed processes have left are deleted first."""
    for folder in _left_behind():
        shutil.rmtree(folder, ignore_errors=True)  # another process may sweep as well

    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        yield Path(name)


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """The lock file of a lab that this process owns until then: free once the process is dead, whatever killed it."""
    with FileLock(lock_file(folder, "owner")) as lock:
        lock.acquire(timeout=5.0)  # nobody else keeps it; who looks at it holds it for an instant
        yield lock.path


def _left_behind() -> list[Path]:
    """Folders of killed processes, once nothing works in them any more: every lock of a lab is then free.

    An owner has its lock before there is a database.
    """
    return [
        folder
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
        if folder.stat(follow_symlinks=False).st_uid == os.getuid()
        and (folder / "lab.db").exists()
        and not any(is_locked(lock) for lock in (folder / "locks").iterdir())
    ]
