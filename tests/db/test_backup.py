"""A backup is whole or not there, whatever goes on meanwhile; and it becomes the lab again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.backup import back_up
from db.errors import LabUnusableError, RefusedError
from db.events import add_event
from db.lab import Lab
from db.store import Store
from tests.db.test_store import ROOT, fill, mounted_tmpfs

if TYPE_CHECKING:
    from tests.db.conftest import Filled

WRITER = """
import sys; from pathlib import Path; from db.events import add_event; from db.lab import Lab
store = Lab(Path(sys.argv[1])).store
for number in range(100_000):
    with store.transaction():
        for half in "ab":
            add_event(store, f"pair {number}", half * 500)
    if number == 200:
        print("writing", flush=True)
"""


def test_a_copy_made_while_another_process_writes_is_one_moment_of_the_lab(filled: Filled) -> None:
    folder = filled.lab.folder
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert writer.stdout
        assert writer.stdout.readline() == b"writing\n"
        copies = [back_up(folder, folder / f"{number}.db").path for number in range(5)]
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()

    counts = []
    for path in copies:
        copy = Store(path, read_only=True)
        rows = [tuple(row.values()) for row in copy.rows("SELECT id, kind, message FROM events ORDER BY id")]
        counts.append(len(rows))
        original = filled.store.rows("SELECT id, kind, message FROM events ORDER BY id LIMIT ?", (len(rows),))
        assert rows == [tuple(row.values()) for row in original]
        assert copy.pending() == []
        copy.close()

    assert counts == sorted(counts)
    assert counts[0] >= 400
    assert [count % 2 for count in counts] == [0] * 5  # no transaction is in it by half
    assert not list(folder.glob(".*"))


def test_a_restored_copy_is_the_lab_again(filled: Filled) -> None:
    folder = filled.lab.folder
    filled.run(filled.experiment())
    made = back_up(folder)
    assert made.path.parent == folder / "backups"
    assert f"move {made.path} to {folder / 'lab.db'}, and delete lab.db-wal and lab.db-shm" in made.restore
    assert made.bytes == made.path.stat().st_size
    assert made.path.stat().st_mode & 0o777 == 0o600
    add_event(filled.store, "later", "")
    filled.lab.close()

    made.path.replace(folder / "lab.db")
    for name in ("lab.db-wal", "lab.db-shm"):
        (folder / name).unlink(missing_ok=True)

    lab = Lab(folder)
    assert lab.store.value("SELECT count(*) FROM runs") == 1
    assert lab.store.value("SELECT count(*) FROM events WHERE kind = 'later'") == 0
    assert lab.store.value("PRAGMA journal_mode") == "wal"  # a copy by VACUUM INTO is not
    lab.close()


def test_what_is_there_is_replaced_only_by_force(filled: Filled, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("mine")
    with pytest.raises(RefusedError, match=r"copy\.db exists; name another file with --output, or .* --force"):
        back_up(filled.lab.folder, target)

    assert target.read_text() == "mine"
    back_up(filled.lab.folder, target, force=True)
    assert target.read_bytes().startswith(b"SQLite format 3")


@pytest.mark.parametrize("name", ["lab.db", "lab.db-wal", "lab.db-shm"])
def test_the_lab_itself_is_never_replaced(filled: Filled, name: str) -> None:
    with pytest.raises(RefusedError, match="is the lab itself"):
        back_up(filled.lab.folder, filled.lab.folder / name, force=True)


def test_what_a_killed_backup_left_goes_with_the_next_one(filled: Filled) -> None:
    folder = filled.lab.folder / "backups"
    folder.mkdir()
    old, new, other = (folder / name for name in (".lab-1.db.a.part", ".lab-2.db.b.part", ".other.db.c.part"))
    for path in (old, new, other):
        path.write_bytes(b"half")

    for path in (old, other):
        os.utime(path, (0, 0))

    made = back_up(filled.lab.folder)
    assert sorted(folder.iterdir()) == sorted([new, other, made.path])


def test_refusals_name_the_place(filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"cannot write /nowhere/copy\.db: No such file or directory; nothing"):
        back_up(filled.lab.folder, Path("/nowhere/copy.db"))

    with pytest.raises(RefusedError, match=r"cannot write .*: File name too long"):
        back_up(filled.lab.folder, tmp_path / ("x" * 300))

    with pytest.raises(RefusedError, match="nothing to back up; name your lab"):
        back_up(tmp_path / "typo")

    assert not (tmp_path / "typo").exists()


def test_a_database_of_a_newer_blueberry_is_copied_as_it_is(filled: Filled) -> None:
    filled.store.execute(
        """
        INSERT INTO _sqlite_migrations
        SELECT max(id) + 1, migration_set, 'm999_future', applied_at FROM _sqlite_migrations
        """
    )
    copy = Store(back_up(filled.lab.folder).path, read_only=True)
    assert copy.value("SELECT count(*) FROM _sqlite_migrations WHERE name = 'm999_future'") == 1
    copy.close()


def test_a_damaged_lab_leaves_no_copy(filled: Filled, tmp_path: Path) -> None:
    filled.store.execute("PRAGMA foreign_keys = OFF")
    filled.store.execute("INSERT INTO events (at, kind, message, run_id) VALUES ('', '', '', 77)")
    with pytest.raises(LabUnusableError, match=r"damaged, so its copy was thrown away .*events.*; blueberry doctor"):
        back_up(filled.lab.folder, tmp_path / "copy.db")

    assert [path.name for path in tmp_path.iterdir()] == ["lab"]


def test_a_full_disk_is_named_and_left_as_it_was(filled: Filled, tmp_path: Path) -> None:
    small = tmp_path / "small"
    with mounted_tmpfs(small, "size=128k"):
        with pytest.raises(RefusedError, match=r"the disk that holds .*small/copy\.db is full; free some space"):
            back_up(filled.lab.folder, small / "copy.db")

        assert list(small.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        back_up(filled.lab.folder, small / "copy.db")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(RefusedError, match=r"other\.db: Read-only file system"):
            back_up(filled.lab.folder, small / "other.db")


def test_a_lab_on_a_full_disk_can_be_copied_to_another(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=1m"):
        lab = Lab(tmp_path / "small" / "lab")
        with pytest.raises(LabUnusableError):
            fill(lab.store)

        with pytest.raises(RefusedError, match=r"is full; .* --output|No space left"):
            back_up(lab.folder)

        back_up(lab.folder, tmp_path / "copy.db")
        lab.close()
