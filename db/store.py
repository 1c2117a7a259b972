"""The lab's database file: connections, transactions, and nothing else.

A Store is one SQLite connection and belongs to one thread. Writers begin IMMEDIATE, so that a transaction that reads
and then writes cannot fail half-way; a commit is on disk when it returns (synchronous=FULL).

SQLite comes from pysqlite3 where that is installed: 3.7.0 to 3.51.2 can lose commits in WAL mode.
"""

from __future__ import annotations

import functools
import json
import sqlite3 as builtin_sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlite_utils import Database
from sqlite_utils.utils import sqlite3  # type: ignore[attr-defined]  # pysqlite3 where installed

from db.errors import LabUnusableError, NewerLabError, NotFoundError, RefusedError
from db.failpoints import failpoint
from db.migrations import MIGRATIONS
from db.processes import FileLock

BUSY_SECONDS = 30.0
"""How long a writer waits for another; at saturation the busy handler is unfair (p99 2.7 s measured)."""

_FAULTS = (sqlite3.DatabaseError, builtin_sqlite3.DatabaseError)


class Store:
    """One connection to `lab.db`, which is created and migrated when needed.

    Raises (from every method):
        LabUnusableError: the file cannot be read or written; the message says what to do.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._steps: list[str] = []
        with self._explained():
            if read_only:
                address = f"file:{quote(str(path))}?mode=ro"
                connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)
            else:
                connection = sqlite3.connect(path, timeout=BUSY_SECONDS)

            connection.isolation_level = None  # BEGIN and COMMIT are ours alone
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            self.database = Database(connection)
            if not read_only:
                self._migrate()

    def close(self) -> None:
        """Closes the connection."""
        self.database.conn.close()

    @contextmanager
    def transaction(self, step: str = "") -> Iterator[None]:
        """All writes within it, or none. One inside another joins it.

        Args:
            step: the step of a protocol that it is, if any. STEP.commit and STEP.committed are failpoints of the
                transaction that it is or has joined.
        """
        connection = self.database.conn
        if connection.in_transaction:
            self._steps += [step] * bool(step)
            yield
            return

        self._steps = [step] * bool(step)
        with self._explained():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                for name in self._steps:
                    failpoint(f"{name}.commit")

                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have rolled back already
                    connection.execute("ROLLBACK")

                raise

        for name in self._steps:
            failpoint(f"{name}.committed")

    def rows(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query, or of a statement with RETURNING."""
        with self._explained():
            cursor = self.database.conn.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def row(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> dict[str, Any] | None:
        """The first row, or None."""
        return next(iter(self.rows(sql, values)), None)

    def value(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """The first column of the first row, or None."""
        row = self.row(sql, values)
        return next(iter(row.values())) if row else None

    def execute(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Runs a statement that writes; returns the number of rows changed."""
        with self._explained():
            return int(self.database.conn.execute(sql, values).rowcount)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs a statement once a row."""
        with self._explained():
            self.database.conn.executemany(sql, rows)

    def insert(self, table: str, values: Mapping[str, Any]) -> int:
        """Inserts one row, lists and dicts as JSON; returns its id."""
        columns = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        with self._explained():
            cursor = self.database.conn.execute(
                f"INSERT INTO {table} ({columns}) VALUES ({marks})", [to_column(value) for value in values.values()]
            )
            return int(cursor.lastrowid or 0)

    def missing(self, what: str, table: str, key: int) -> NotFoundError:
        """The error that there is no row of that id, with the ids that there are."""
        highest = self.value(f"SELECT max(id) FROM {table}")
        return NotFoundError(what, key, f"ids go from 1 to {highest}" if highest else "there is none yet")

    def data_version(self) -> int:
        """A number that changes when another connection has committed."""
        return int(self.value("PRAGMA data_version"))

    def pending(self) -> list[str]:
        """The migrations that the file lacks.

        Raises:
            NewerLabError: it has some that this Blueberry does not know.
        """
        applied = (
            {row["name"] for row in self.rows("SELECT name FROM _sqlite_migrations")} if self._is_migrated() else set()
        )
        if unknown := sorted(applied - _known_migrations()):
            raise NewerLabError(
                f"{self.path} was written by a newer Blueberry ({', '.join(unknown)}); update this installation"
            )

        return sorted(_known_migrations() - applied)

    def _migrate(self) -> None:
        # A restored backup, or what .recover saved, is not in WAL mode.
        if not self.pending() and self.value("PRAGMA journal_mode") == "wal":
            return

        # Four processes that migrate at once fail often; the lock makes it one after the other.
        with FileLock(self.path.with_name("migrate.lock")) as lock:
            if not lock.acquire(BUSY_SECONDS):
                raise LabUnusableError(f"another process has been migrating {self.path} for {BUSY_SECONDS:.0f} s")

            failpoint("migrate.locked")
            self.database.conn.execute("PRAGMA journal_mode = WAL")
            failpoint("migrate.wal")
            MIGRATIONS.apply(self.database)
            failpoint("migrate.applied")

    def _is_migrated(self) -> bool:
        return bool(self.value("SELECT count(*) FROM sqlite_master WHERE name = '_sqlite_migrations'"))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OverflowError:
            raise RefusedError("the call has a number that is too large for an id or a count here") from None
        except _FAULTS as error:
            message = _explain(str(error), self.path)
            if message is None:
                raise  # a bug of ours, such as a broken constraint: not the user's to mend

            raise LabUnusableError(message) from error


@contextmanager
def snapshot(path: Path) -> Iterator[Store]:
    """One state of the lab, to read from whatever is written meanwhile."""
    store = Store(path, read_only=True)
    try:
        store.execute("BEGIN")
        yield store
    finally:
        store.close()


@functools.cache
def _known_migrations() -> frozenset[str]:
    return frozenset(migration.name for migration in MIGRATIONS.pending(Database(memory=True)))


def to_column(value: Any) -> Any:
    """A Python value as SQLite stores it: lists and dicts as JSON text with sorted keys."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True, allow_nan=False)

    return value


def _explain(text: str, path: Path) -> str | None:
    table = {
        "readonly": f"{path} is read-only; make the lab's folder writable, or name another lab with --lab",
        "unable to open": f"{path} cannot be opened; check that its folder exists and is writable",
        "disk is full": f"the disk that holds {path} is full; free some space and try again; nothing was half written",
        "disk I/O error": f"reading or writing {path} failed; check the disk (full, or read-only?) and try again",
        "not a database": f"{path} is not a database; move it away to start a new lab, or restore a backup",
        "image is malformed": f"{path} is damaged; restore a backup, or save what is left: sqlite3 {path} .recover",
        "locked": f"{path} stayed locked for {BUSY_SECONDS:.0f} s by another program; close it and try again",
    }
    return next((message for sign, message in table.items() if sign in text), None)
