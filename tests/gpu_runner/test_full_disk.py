"""The disk is full or read-only at the worst moment: a clear state, nothing half written, and it goes on by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.clock import now
from db.errors import LabUnusableError
from db.processes import is_locked, is_process

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The lab's folder as a disk of its own, of 80 MiB: to be named before `bench`."""
    folder = tmp_path / "lab"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")

    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    path = folder / "a film"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass

    assert shutil.disk_usage(folder).free == 0
    return path


def assert_whole(bench: Bench) -> None:
    assert bench.store.value("PRAGMA integrity_check") == "ok"
    assert bench.store.rows("PRAGMA foreign_key_check") == []


def test_a_disk_that_runs_full_while_a_run_trains(disk: Path, bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: (bench.run(key).step or 0) > 3, "training")
    child = daemon.attempts.held[bench.attempts(key)[0].id].child
    film = fill(disk)
    with pytest.raises(LabUnusableError, match="is full; free some space"):
        bench.step_until(daemon, lambda: False, "a step that fails")

    # The training process gives up, and the shim waits for the few bytes in which to say so.
    child_pid = bench.child_pid(key)
    bench.until(lambda: not Path(f"/proc/{child_pid}").exists(), "the training process ended")
    assert is_locked(child.directory / "lock")
    assert not (child.directory / "exit.json").exists()
    film.unlink()
    bench.go()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "done again")
    run = bench.run(key)
    assert (run.failures, run.lost, run.error) == (0, 0, None)
    assert bench.statuses(key) == ["cancelled", "completed"]
    assert bench.attempts(key)[0].error == "moe.train could not write: the disk was full or read-only"
    bench.assert_ended_once(key)
    assert_whole(bench)


def test_a_result_is_not_lost_for_want_of_the_few_bytes_that_say_so(disk: Path, bench: Bench) -> None:
    bench.register()
    key = bench.enqueue(config={"act": "train", "film": str(disk / "a film")})
    daemon = bench.daemon()
    daemon.step(now())
    directory = bench.directory(key)
    bench.until(lambda: (directory / "score.json").exists() and not shutil.disk_usage(disk).free, "scored, and full")
    with suppress(LabUnusableError):
        daemon.step(now())

    assert is_locked(directory / "lock")
    (disk / "a film").unlink()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "settled")
    assert bench.statuses(key) == ["completed"]
    bench.assert_ended_once(key)
    assert_whole(bench)


def test_runs_folder_that_is_read_only_is_waited_out(disk: Path, bench: Bench) -> None:
    bench.register()
    runs = bench.lab.runs_folder
    subprocess.run(["mount", "-t", "tmpfs", "none", str(runs)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(runs)], check=True)
        key = bench.enqueue("train")
        daemon = bench.daemon()
        with pytest.raises(OSError, match="Read-only file system"):
            daemon.step(now())

        assert bench.run(key).status == "queued"
        assert "could not be started" in (bench.attempts(key)[0].error or "")
        subprocess.run(["mount", "-o", "remount,rw", str(runs)], check=True)
        second = bench.daemon("cpu-b")
        bench.step_until(second, lambda: bench.run(key).status == "completed", "done")
        bench.assert_ended_once(key)
        assert (bench.run(key).failures, bench.run(key).lost) == (0, 0)
    finally:
        bench.close()
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


def test_a_read_only_database_is_waited_out_while_the_child_trains(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    daemon.store.database.conn.execute("PRAGMA query_only = ON")
    with pytest.raises(LabUnusableError, match="read-only; make the lab's folder writable"):
        bench.step_until(daemon, lambda: False, "a failing step")

    assert is_locked(bench.directory(key) / "lock")
    daemon.store.database.conn.execute("PRAGMA query_only = OFF")
    bench.go()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "done")
    bench.assert_ended_once(key)


def test_a_daemon_started_on_a_full_disk_says_so_and_the_next_one_does_the_work(disk: Path, bench: Bench) -> None:
    key = bench.enqueue()
    film = fill(disk)
    command = [sys.executable, "-m", "gpu_runner", str(disk)]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    daemon = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=paths)
    assert daemon.returncode == 1
    assert "is full; free some space and try again; nothing was half written" in daemon.stderr
    assert "Traceback" not in daemon.stderr
    film.unlink()
    bench.start()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    assert_whole(bench)


def test_nothing_trains_on_for_a_lab_that_was_deleted(bench: Bench) -> None:
    key = bench.enqueue("hang")
    daemon = bench.start()
    bench.until(lambda: bench.attempts(key) and (bench.directory(key) / "metrics.jsonl").exists(), "training")
    shim, child = bench.shim_pid(key), bench.child_pid(key)
    shutil.rmtree(bench.lab.runs_folder)
    for path in bench.lab.folder.glob("lab.db*"):
        path.unlink()

    assert daemon.wait(60) == 1
    bench.until(lambda: not is_process(shim) and not is_process(child), "its processes ended")
    bench.lab.runs_folder.mkdir()
