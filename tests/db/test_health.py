"""What a look at a lab finds, and that looking changes nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.backup import back_up
from db.clock import now
from db.events import add_event
from db.health import Check, check_lab, check_sqlite
from db.processes import FileLock
from db.queue import claim_run
from db.runners import set_mode, start_runner
from db.store import Store
from db.tasks import add_task, start_task
from tests.db.test_store import mounted_tmpfs

if TYPE_CHECKING:
    from tests.db.conftest import Filled


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("BLUEBERRY_", "OPENROUTER_")):
            monkeypatch.delenv(name)


def look(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in check_lab(folder)}


def amiss(folder: Path) -> dict[str, Check]:
    """What is not well; whatever is not must have a fix, but for the free disk of the machine that tests."""
    found = {name: check for name, check in look(folder).items() if check.level != "ok" and name != "disk"}
    assert all(check.fix for check in found.values())
    return found


@pytest.mark.parametrize(
    ("version", "bug"),
    [
        ("3.6.23", False),
        ("3.7.0", True),
        ("3.40.1", True),
        ("3.44.5", True),
        ("3.44.6", False),
        ("3.45.0", True),
        ("3.50.6", True),
        ("3.50.7", False),
        ("3.51.0", True),
        ("3.51.2", True),
        ("3.51.3", False),
        ("3.53.4", False),
    ],
)
def test_the_wal_reset_bug_is_known_by_version(version: str, bug: bool) -> None:
    check = check_sqlite(version)
    assert check.level == ("problem" if bug else "ok")
    assert ("pysqlite3" in check.fix) is bug


def test_a_new_lab_is_well(filled: Filled) -> None:
    filled.runner()
    assert amiss(filled.lab.folder) == {}
    assert "CPU CPU, 1.0 GiB" in look(filled.lab.folder)["card"].says


def test_a_lab_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = amiss(tmp_path / "lab")
    assert list(found) == ["folder"]
    assert "there is no lab at" in found["folder"].says
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_and_an_open_env_are_two_problems(filled: Filled) -> None:
    folder = filled.lab.folder
    (folder / "blueberry.toml").write_text("autostart = true\n")
    (folder / ".env").write_text("OPENROUTER_API_KEY=sk-or-very-secret\n")
    (folder / ".env").chmod(0o644)
    found = amiss(folder)
    assert list(found) == ["configuration", "key"]
    assert "unknown key 'autostart'" in found["configuration"].says
    assert found["key"].fix == f"run: chmod 600 {folder / '.env'}"
    assert "very-secret" not in str(found)

    (folder / ".env").chmod(0o600)
    (folder / "blueberry.toml").unlink()
    assert amiss(folder) == {}


def test_a_damaged_file_is_found_and_the_newest_backup_named(filled: Filled) -> None:
    folder = filled.lab.folder
    for number in range(400):
        add_event(filled.store, f"event {number}", "x" * 200)

    filled.lab.close()
    whole = (folder / "lab.db").read_bytes()
    (folder / "lab.db").write_bytes(whole[: len(whole) // 2] + b"\xff" * 20_000 + whole[len(whole) // 2 + 20_000 :])
    found = amiss(folder)
    assert list(found) == ["database"]
    assert "is damaged" in found["database"].says
    assert ".recover" in found["database"].fix

    (folder / "lab.db").write_bytes(whole)
    backup = back_up(folder).path
    (folder / "lab.db").write_text("no database at all, but text that is longer than a header" * 100)
    found = amiss(folder)
    assert "is not a database" in found["database"].says
    assert str(backup) in found["database"].fix


def test_a_row_whose_parent_is_missing(filled: Filled) -> None:
    filled.store.execute("PRAGMA foreign_keys = OFF")
    filled.store.execute("INSERT INTO events (at, kind, message, run_id) VALUES ('', '', '', 77)")
    found = amiss(filled.lab.folder)
    assert list(found) == ["foreign keys"]
    assert "1 row with a parent that is missing: one of events names one of runs" in found["foreign keys"].says


def test_an_older_and_a_newer_schema(filled: Filled, tmp_path: Path) -> None:
    filled.store.execute("UPDATE _sqlite_migrations SET name = 'm999_future' WHERE name = 'm001_lab'")
    [newer] = amiss(filled.lab.folder).values()
    assert (newer.level, "newer Blueberry" in newer.says, newer.fix) == ("problem", True, "update this installation")

    old = tmp_path / "old"
    old.mkdir()
    (old / "lab.db").write_bytes(b"")
    [older] = amiss(old).values()
    assert (older.name, older.level, "m001_lab, " in older.says) == ("schema", "warning", True)
    assert (old / "lab.db").stat().st_size == 0


def test_runs_queued_for_hardware_that_is_no_more(filled: Filled) -> None:
    filled.runner()
    filled.run(filled.experiment())
    assert "queue" not in amiss(filled.lab.folder)
    filled.runner(hardware_class="cpu, 2 processes")
    assert amiss(filled.lab.folder)["queue"].says == "1 queued for cpu, which this lab no longer has"


def test_what_killed_processes_left_behind(filled: Filled) -> None:
    lab, store = filled.lab, filled.store
    runner = filled.runner()
    filled.run(filled.experiment())
    start_runner(store, runner.id, pid=4_000_000, boot_id=now().boot_id, message="training")
    claim = claim_run(store, runner, now(), lease_seconds=30)
    assert claim is not None
    start_task(store, add_task(store, "suggest", {}).id)
    add_task(store, "suggest", {})

    found = amiss(lab.folder)
    assert {name: check.level for name, check in found.items()} == dict.fromkeys(
        ["runner 1", "attempts", "mind"], "warning"
    )
    assert "written down as running (pid 4000000), but it is dead" in found["runner 1"].says
    assert "1 attempt written down as live" in found["attempts"].says
    assert "2 calls of agents and 0 experiments to judge wait, 1 of the calls cut off half-way" in found["mind"].says

    # Alive, all of it: the locks say so.
    (lab.runs_folder / claim.attempt.directory).mkdir()
    tree = lab.runs_folder / claim.attempt.directory / "lock"
    with FileLock(lab.lock("runner-cpu")) as one, FileLock(tree) as two, FileLock(lab.lock("mind")) as three:
        assert one.acquire()
        assert two.acquire()
        assert three.acquire()
        assert amiss(lab.folder) == {}
        set_mode(store, runner.id, "paused")
        [paused] = amiss(lab.folder).values()
        assert paused.says.endswith("it is paused, so it claims nothing")
        assert paused.fix == "blueberry runner resume"
        set_mode(store, runner.id, "open")
        two.release()
        assert amiss(lab.folder) == {}  # the runner that lives is about to settle it
        store.execute("UPDATE attempts SET lease_until = 0")
        assert "blueberry runner stop, then" in amiss(lab.folder)["attempts"].fix


def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=4m"):
        folder = tmp_path / "small" / "lab"
        folder.mkdir()
        Store(folder / "lab.db").close()
        with FileLock(folder / "locks" / "mind.lock"):
            assert look(folder)["disk"].level == "warning"
            assert "0.0 GiB are free" in look(folder)["disk"].says

        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "small")], check=True)
        found = amiss(folder)
        assert "cannot be written: Read-only file system" in found["folder"].says
        assert found["database"].level == "problem"
