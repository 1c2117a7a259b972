"""The database file: made once by whoever comes first, and never half written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.errors import LabUnusableError
from db.events import add_event, latest_event_id
from db.lab import Lab
from db.migrations import MIGRATIONS
from db.store import Store

if TYPE_CHECKING:
    from tests.db.conftest import Filled

ROOT = Path(__file__).parents[2]


def test_migration_from_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "lab.db")
    assert store.value("PRAGMA journal_mode") == "wal"
    assert store.value("PRAGMA synchronous") == 2  # FULL
    assert store.value("PRAGMA foreign_keys") == 1
    assert store.value("PRAGMA integrity_check") == "ok"
    names = [row["name"] for row in store.rows("SELECT name FROM _sqlite_migrations ORDER BY id")]
    assert names == [migration.name for migration in MIGRATIONS.applied(store.database)]
    assert names[0] == "m001_lab"
    assert tuple(map(int, store.value("SELECT sqlite_version()").split("."))) >= (3, 51, 3)  # the WAL-reset bug
    store.close()

    again = Store(tmp_path / "lab.db")
    assert [row["name"] for row in again.rows("SELECT name FROM _sqlite_migrations ORDER BY id")] == names
    again.close()


def test_four_processes_open_a_fresh_lab_at_once(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from db.lab import Lab; input(); Lab(Path(sys.argv[1])).store"
    folder = tmp_path / "lab"
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(4)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"\n")
        opener.stdin.flush()

    assert [opener.communicate(timeout=60)[1] for opener in openers] == [b""] * 4
    assert [opener.returncode for opener in openers] == [0] * 4
    store = Store(folder / "lab.db")
    assert store.value("SELECT count(*) FROM _sqlite_migrations") == len(MIGRATIONS.applied(store.database))
    store.close()


def test_newer_database_is_refused_untouched(tmp_path: Path) -> None:
    store = Store(tmp_path / "lab.db")
    store.execute(
        """
        INSERT INTO _sqlite_migrations
        SELECT max(id) + 1, migration_set, 'm999_future', applied_at FROM _sqlite_migrations
        """
    )
    store.close()
    with pytest.raises(LabUnusableError, match=r"written by a newer Blueberry \(m999_future\); update"):
        Store(tmp_path / "lab.db")


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lab.db").write_bytes(b"just some text, longer than a header, " * 100)
    with pytest.raises(LabUnusableError, match="is not a database; move it away"):
        Store(tmp_path / "lab.db")


def test_transaction_is_all_or_nothing(filled: Filled) -> None:
    store = filled.store
    before = latest_event_id(store)

    def fail_half_way() -> None:
        with store.transaction():
            add_event(store, "one", "one")
            with store.transaction():
                add_event(store, "two", "two")

            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()

    assert latest_event_id(store) == before
    with store.transaction():
        add_event(store, "three", "three")

    assert latest_event_id(store) == before + 1


def test_data_version_tells_of_others_only(filled: Filled) -> None:
    other = Lab(filled.lab.folder)
    before = other.store.data_version()
    add_event(other.store, "mine", "")
    assert other.store.data_version() == before
    add_event(filled.store, "theirs", "")
    assert other.store.data_version() != before
    other.close()


def test_bug_of_ours_is_not_explained_away(filled: Filled) -> None:
    with pytest.raises(Exception, match="NOT NULL constraint") as caught:
        filled.store.execute("INSERT INTO events (kind) VALUES ('x')")

    assert not isinstance(caught.value, LabUnusableError)


def test_full_disk_loses_nothing_and_heals(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=1m"):
        lab = Lab(tmp_path / "small" / "lab")
        add_event(lab.store, "first", "")
        with pytest.raises(LabUnusableError, match=r"the disk that holds .*lab\.db is full|reading or writing"):
            fill(lab.store)

        kept = latest_event_id(lab.store)
        assert kept >= 1
        lab.close()

        again = Lab(tmp_path / "small" / "lab")
        assert again.store.value("PRAGMA integrity_check") == "ok"
        assert latest_event_id(again.store) == kept
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "small")], check=True)
        add_event(again.store, "last", "")
        assert latest_event_id(again.store) == kept + 1
        again.close()


def test_read_only_lab_says_so(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "mount", "size=8m"):
        Lab(tmp_path / "mount" / "lab").store.close()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "mount")], check=True)
        lab = Lab(tmp_path / "mount" / "lab")
        with pytest.raises(LabUnusableError, match=r"read-only|cannot be opened"):
            add_event(lab.store, "x", "")

        lab.close()
        with pytest.raises(LabUnusableError, match=r"cannot be used: Read-only file system; make the folder writable"):
            Lab(tmp_path / "mount" / "other")


def test_lab_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabUnusableError, match="name another with --lab"):
        Lab(tmp_path / "file")


def fill(store: Store) -> None:
    """Writes 100 MB."""
    for _ in range(10_000):
        add_event(store, "filler", "x" * 10_000)


@contextmanager
def mounted_tmpfs(place: Path, options: str) -> Iterator[None]:
    """A small file system of its own."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")

    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
