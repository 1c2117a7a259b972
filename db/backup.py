"""A copy of the lab's database, made while others write to it: VACUUM INTO, checked before it gets its name.

It is one file that any SQLite opens. Keys are in the environment or in `.env`, never in the database, so none is in the
copy; nor are blueberry.toml and what lies in runs/ and data/.
"""

from __future__ import annotations

import glob
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from db.errors import LabUnusableError, RefusedError
from db.failpoints import failpoint
from db.processes import sync_folder
from db.store import Store

ABANDONED_SECONDS = 3600.0
"""After so long without a byte, nobody writes an unfinished copy any more."""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """A finished copy. `restore` says in a sentence how it becomes the lab again."""

    path: Path
    bytes: int
    restore: str


def back_up(folder: Path, output: Path | None = None, *, force: bool = False) -> Backup:
    """Copies `lab.db` of the lab in `folder`; a database of an older or newer Blueberry too, and as it is.

    Args:
        folder: the lab's.
        output: the file to make, or a folder for one named by the time (UTC); LAB/backups/ by default.
        force: whether a file of that name may be replaced.

    Raises:
        RefusedError: there is nothing to copy, or the copy cannot be written or may not replace what is there.
        LabUnusableError: the database is damaged.
    """
    database = folder / "lab.db"
    target = (output or folder / "backups").absolute()
    try:
        if not database.exists():
            raise RefusedError(f"there is no {database}, so there is nothing to back up; name your lab with --lab")

        if output is None:
            target.mkdir(mode=0o700, exist_ok=True)

        if target.is_dir():
            target /= f"lab-{datetime.now(UTC):%Y%m%d-%H%M%S}.db"

        _may_write(target, database, force=force)
        _clear_away(target)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            _copy(database, Path(name), target)
            failpoint("backup.copied")
            os.fsync(descriptor)
            _give_name(Path(name), target, force=force)
            failpoint("backup.named")
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)

        sync_folder(target.parent)
    except OSError as error:
        raise RefusedError(
            f"cannot write {target}: {error.strerror}; nothing was backed up; name another place with --output"
        ) from None

    return Backup(path=target, bytes=target.stat().st_size, restore=how_to_restore(folder, target))


def how_to_restore(folder: Path, copy: Path) -> str:
    """What a person does to make the lab what it was."""
    return (
        "to restore it, stop the runner (blueberry runner stop, or end its process) and close the chat clients, "
        f"move {copy} to {folder / 'lab.db'}, and delete lab.db-wal and lab.db-shm beside it"
    )


def newest_backup(folder: Path) -> Path | None:
    """The last backup that was made without naming a file."""
    return max((folder / "backups").glob("lab-*.db"), default=None)


def _may_write(target: Path, database: Path, *, force: bool) -> None:
    if target.resolve() in {database.resolve().with_name(f"{database.name}{end}") for end in ("", "-wal", "-shm")}:
        raise RefusedError(f"{target} is the lab itself; give the backup another name")

    if target.exists() and not force:
        raise _taken(target)


def _clear_away(target: Path) -> None:
    """Removes what backups to this folder left when they were killed; one that goes on writes all the time."""
    for name in ("lab-*.db", glob.escape(target.name)):
        for part in target.parent.glob(f".{name}.*.part*"):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink(missing_ok=True)


def _copy(database: Path, temporary: Path, target: Path) -> None:
    store = Store(database, read_only=True)
    try:
        store.execute("VACUUM INTO ?", (str(temporary),))
    except LabUnusableError as error:
        if "disk is full" not in str(error.__cause__):
            raise

        raise RefusedError(
            f"the disk that holds {target} is full; free some space, or name another disk with --output; "
            "nothing was backed up"
        ) from None
    finally:
        store.close()

    copy = Store(temporary, read_only=True)
    try:
        faults = [row["integrity_check"] for row in copy.rows("PRAGMA integrity_check(1)")]
        faults += [f"a row of {row['table']} names one missing" for row in copy.rows("PRAGMA foreign_key_check")]
    finally:
        copy.close()

    if faults[0] != "ok" or len(faults) > 1:
        raise LabUnusableError(
            f"{database} is damaged, so its copy was thrown away ({faults[-1]}); blueberry doctor says what to do"
        )


def _give_name(temporary: Path, target: Path, *, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, target)  # unlike a rename, it never replaces what came there meanwhile
            return
        except FileExistsError:
            raise _taken(target) from None
        except OSError:  # no links on this file system (FAT, network drives): a look must do
            if target.exists():
                raise _taken(target) from None

    temporary.replace(target)


def _taken(target: Path) -> RefusedError:
    return RefusedError(f"{target} exists; name another file with --output, or replace it with --force")
