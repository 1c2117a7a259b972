"""What could be wrong with a lab, as its folder and its database tell it: a list of checks, each with what to do.

Looking changes nothing: a lab that is not there is not made, an old database is not migrated.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlite_utils.utils import sqlite3  # type: ignore[attr-defined]  # pysqlite3 where installed

from db.backup import how_to_restore, newest_backup
from db.clock import now
from db.errors import LabError, LabUnusableError, SettingsError
from db.experiments import experiments_to_judge
from db.lab import lock_file
from db.processes import is_locked
from db.queue import live_attempts
from db.runners import list_runners
from db.settings import load_openrouter, load_settings
from db.store import Store
from db.tasks import open_tasks

FREE_BYTES = 2 * 2**30
"""Less free disk is a warning: one run of the preset t4 keeps about 1.3 GB of checkpoints while it trains."""

Level = Literal["ok", "warning", "problem"]


class Check(BaseModel):
    """One thing looked at. `fix` says in a sentence what to do; it is empty when all is well."""

    model_config = ConfigDict(frozen=True)

    name: str
    level: Level
    says: str
    fix: str = ""


def check_lab(folder: Path) -> Iterator[Check]:
    """Everything about one lab, from the library that opens it to what its processes left undone."""
    yield check_sqlite(sqlite3.sqlite_version)
    parts = {"folder": _check_folder, "configuration": _check_settings, "database": _check_database}
    for name, check in parts.items():
        try:
            yield from check(folder)
        except LabError as error:
            yield of_error(name, error)
        except OSError as error:
            says = f"{error.filename or folder} cannot be used: {error.strerror}"
            fix = "make the lab's folder yours and writable, or name another with --lab"
            yield Check(name=name, level="problem", says=says, fix=fix)


def of_error(name: str, error: LabError) -> Check:
    """A problem whose message says what is wrong, and after a semicolon what to do."""
    says, _, fix = str(error).partition("; ")
    return Check(name=name, level="problem", says=says, fix=fix)


def check_sqlite(version: str) -> Check:
    """Whether this SQLite can lose commits in WAL mode, as all from 3.7.0 to 3.51.2 can but two backports."""
    number = tuple(map(int, version.split(".")))
    mended = (3, 44, 6) <= number < (3, 45) or (3, 50, 7) <= number < (3, 51) or number >= (3, 51, 3)
    if mended or number < (3, 7):
        return Check(name="sqlite", level="ok", says=f"SQLite {version}, without the WAL-reset bug")

    return Check(
        name="sqlite",
        level="problem",
        says=f"SQLite {version} has the WAL-reset bug: it can lose what was written",
        fix="pip install 'pysqlite3>=0.6.1', or use a Python that has SQLite 3.51.3 or newer",
    )


def _check_folder(folder: Path) -> Iterator[Check]:
    if not folder.exists():
        fix = "the first command makes it; if yours is elsewhere, name it with --lab or BLUEBERRY_LAB"
        yield Check(name="folder", level="warning", says=f"there is no lab at {folder} yet", fix=fix)
        return

    try:
        with tempfile.TemporaryFile(dir=folder):
            yield Check(name="folder", level="ok", says=f"{folder} can be written")
    except OSError as error:
        says = f"{folder} cannot be written: {error.strerror}"
        yield Check(name="folder", level="problem", says=says, fix="make it writable, or name another with --lab")

    free = shutil.disk_usage(folder).free
    says = f"{free / 2**30:.1f} GiB are free"
    if free < FREE_BYTES:
        fix = "free some space: no run starts that the disk could not hold; blueberry clean shows what may go"
        yield Check(name="disk", level="warning", says=says, fix=fix)
    else:
        yield Check(name="disk", level="ok", says=says)


def _check_settings(folder: Path) -> Iterator[Check]:
    path = folder / "blueberry.toml"
    try:
        load_settings(folder)
        says = f"{path.name} is valid" if path.exists() else "the built-in defaults"
        yield Check(name="configuration", level="ok", says=says)
    except SettingsError as error:
        fix = f"correct it in {path} or in the environment; the README's section Configuration shows the keys"
        yield Check(name="configuration", level="problem", says=str(error), fix=fix)

    try:
        has_key = load_openrouter(folder).api_key is not None
        says = "there is one for OpenRouter" if has_key else "none: the lab works without a language model"
        yield Check(name="key", level="ok", says=says)
    except SettingsError as error:
        yield of_error("key", error)


def _check_database(folder: Path) -> Iterator[Check]:
    path = folder / "lab.db"
    if not path.exists():
        yield Check(name="database", level="ok", says="there is none yet; the first command makes it")
        return

    try:
        store = Store(path, read_only=True)
        try:
            found = " ".join(store.value("PRAGMA quick_check(1)").split())
            if found != "ok":
                raise LabUnusableError(f"{path} is damaged: {found}; save what is left: sqlite3 {path} .recover")

            yield Check(name="database", level="ok", says=f"{path.name} is whole")
            yield from _check_rows(folder, store)
        finally:
            store.close()
    except LabUnusableError as error:
        check = of_error("database", error)
        backup = newest_backup(folder)
        if backup and any(sign in check.says for sign in ("is damaged", "is not a database")):
            check = check.model_copy(update={"fix": how_to_restore(folder, backup)})

        yield check


def _check_rows(folder: Path, store: Store) -> Iterator[Check]:
    if dangling := store.rows("PRAGMA foreign_key_check"):
        child, parent = dangling[0]["table"], dangling[0]["parent"]
        yield Check(
            name="foreign keys",
            level="problem",
            says=f"{_count(dangling, 'row')} with a parent that is missing: one of {child} names one of {parent}",
            fix=f"restore a backup, or mend what this lists: sqlite3 {store.path} 'PRAGMA foreign_key_check'",
        )
    else:
        yield Check(name="foreign keys", level="ok", says="every row that another names is there")

    if pending := store.pending():
        fix = "the next command brings it up to date; make a copy before: blueberry backup"
        says = f"an older Blueberry wrote it: {', '.join(pending)} to come"
        yield Check(name="schema", level="warning", says=says, fix=fix)
        return

    yield Check(name="schema", level="ok", says="up to date")
    yield from _check_runners(folder, store)
    yield from _check_attempts(folder, store)
    yield _check_mind(folder, store)


def _check_runners(folder: Path, store: Store) -> Iterator[Check]:
    runners = list_runners(store)
    if not runners:
        yield Check(name="card", level="ok", says="none was looked for yet; enqueue does, and so does --look")

    for runner in runners:
        device = "card" if runner.device == "cuda" else "CPU"
        says = f"{device} {runner.device_name}, {runner.memory_bytes / 2**30:.1f} GiB, as {runner.hardware_class}"
        said = f" ({runner.message})" if runner.message and runner.status != "stopped" else ""
        yield Check(name="card", level="ok", says=f"{says}, when last looked at on {runner.hostname}{said}")

        heard = f"last heard of at {runner.heartbeat_at}"
        name = f"runner {runner.id}"
        if is_locked(lock_file(folder, f"runner-{runner.device_key}")):
            says = f"alive (pid {runner.pid}), {heard}"
            if runner.mode == "open":
                yield Check(name=name, level="ok", says=says)
            else:
                says += f"; it is {runner.mode}, so it claims nothing"
                yield Check(name=name, level="warning", says=says, fix="blueberry runner resume")
        elif runner.status == "running":
            fix = "start it anew, and it takes over what was training: blueberry run"
            says = f"written down as running (pid {runner.pid}), but it is dead, {heard}"
            yield Check(name=name, level="warning", says=says, fix=fix)
        else:
            yield Check(name=name, level="ok", says="not running; blueberry run starts it")

    known = {runner.hardware_class for runner in runners}
    for row in store.rows("SELECT hardware_class, count(*) AS runs FROM runs WHERE status = 'queued' GROUP BY 1"):
        if row["hardware_class"] not in known:
            yield Check(
                name="queue",
                level="warning",
                says=f"{row['runs']} queued for {row['hardware_class']}, which this lab no longer has",
                fix="set [runner] back (processes, device) and restart it, or cancel them and enqueue again",
            )


def _check_attempts(folder: Path, store: Store) -> Iterator[Check]:
    at = now()
    live = live_attempts(store)
    orphans = [item for item in live if not is_locked(folder / "runs" / item.directory / "lock")]
    # A runner that lives settles what has ended within a second; one that hangs does not renew the lease.
    has_runner = any(is_locked(lock_file(folder, f"runner-{runner.device_key}")) for runner in list_runners(store))
    left = [item for item in orphans if not has_runner or item.boot_id != at.boot_id or item.lease_until < at.seconds]
    if left:
        yield Check(
            name="attempts",
            level="warning",
            says=f"{_count(left, 'attempt')} written down as live, but every process of it is dead: "
            f"runs {', '.join(str(item.run_id) for item in left[:5])}",
            fix="the runner settles them, and puts back what was lost: "
            + ("blueberry runner stop, then blueberry run" if has_runner else "blueberry run"),
        )
    else:
        yield Check(name="attempts", level="ok", says=f"{_count(live, 'attempt')} under way, and none left behind")


def _check_mind(folder: Path, store: Store) -> Check:
    tasks, unjudged = open_tasks(store), experiments_to_judge(store)
    waiting = f"{_count(tasks, 'call')} of agents and {_count(unjudged, 'experiment')} to judge"
    if is_locked(lock_file(folder, "mind")):
        return Check(name="mind", level="ok", says=f"at work: {waiting}")

    if not tasks and not unjudged:
        return Check(name="mind", level="ok", says="idle: no call waits for an agent, nothing is to be judged")

    cut_off = sum(task.status == "running" for task in tasks)
    also = f", {cut_off} of the calls cut off half-way" if cut_off else ""
    fix = "wake it: blueberry status --watch"
    return Check(name="mind", level="warning", says=f"{waiting} wait{also}, and no mind process lives", fix=fix)


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
