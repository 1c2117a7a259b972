"""What stays on disk when runs have ended, and what happens when there is too little of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.clock import now
from db.experiments import move_experiment
from db.logs import RUN_LOG_BYTES
from db.queue import cancel_experiment_runs
from db.runners import list_runners
from db.settings import load_settings
from db.weights import SPARE_BYTES, drop_weights, has_weights, held_bytes, list_weights, measure
from moe.accounting import disk_bytes
from moe.presets import PRESETS

if TYPE_CHECKING:
    from gpu_runner.daemon import Daemon
    from tests.gpu_runner.conftest import Bench

MICRO = PRESETS["micro"]


def trained(bench: Bench, *sizes: int) -> list[int]:
    """Completed runs with so many bytes of weights each, of an experiment that led to nothing."""
    daemon = bench.daemon()
    keys = [bench.enqueue(config={"act": "train", "weights": size}) for size in sizes]
    move_experiment(bench.store, bench.experiment_id, "queued", allowed=["suggested"])
    bench.step_until(daemon, lambda: all(bench.run(key).status == "completed" for key in keys), "all trained")
    move_experiment(bench.store, bench.experiment_id, "concluded", allowed=["running"])
    return keys


def set_runner(bench: Bench, *lines: str) -> None:
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text("\n".join([settings.read_text(), *lines, ""]))


def cap_at(daemon: Daemon, count: int) -> None:
    daemon.lab.settings = load_settings(daemon.lab.folder)
    runner = daemon.lab.settings.runner.model_copy(update={"max_disk_gib": count / 2**30})
    daemon.lab.settings = daemon.lab.settings.model_copy(update={"runner": runner})


def size(directory: Path) -> int:
    return sum(measure(directory).values())


def message(bench: Bench) -> str:
    return list_runners(bench.store)[0].message or ""


@pytest.fixture
def disk(bench: Bench) -> Iterator[Path]:
    """runs/ as a disk of its own of 64 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(bench.lab.runs_folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")

    yield bench.lab.runs_folder
    bench.close()
    subprocess.run(["umount", str(bench.lab.runs_folder)], check=True)


def test_weights_go_when_their_experiment_is_over_and_nothing_needs_them(bench: Bench) -> None:
    bench.register()
    daemon = bench.daemon()
    base = bench.enqueue(arm="baseline", config={"act": "train", "weights": 3000})
    treated = bench.enqueue(config={"act": "train", "weights": 2000})
    move_experiment(bench.store, bench.experiment_id, "queued", allowed=["suggested"])
    bench.step_until(daemon, lambda: bench.run(treated).status == "completed", "both trained")
    paths = [bench.directory(key) / "checkpoint.pt" for key in (base, treated)]
    daemon.room.tidy()
    assert [path.exists() for path in paths] == [True, True]  # the judge may ask for more
    assert held_bytes(bench.store) == sum(size(path.parent) for path in paths)

    move_experiment(bench.store, bench.experiment_id, "concluded", allowed=["running"])
    daemon.room.tidy()
    assert [path.exists() for path in paths] == [True, False]
    assert (has_weights(bench.store, base), has_weights(bench.store, treated)) == (True, False)
    assert held_bytes(bench.store) == sum(size(path.parent) for path in paths)
    assert (paths[1].parent / "score.json").exists()


def test_all_are_kept_until_the_next_run_needs_the_room(bench: Bench) -> None:
    cap = disk_bytes(MICRO) + 5000
    bench.register()
    set_runner(bench, 'keep = "all"')
    keys = trained(bench, 4000, 3000, 2000)
    daemon = bench.daemon()
    daemon.room.tidy()
    assert [has_weights(bench.store, key) for key in keys] == [True] * 3

    bench.enqueue(config=MICRO.model_dump())
    cap_at(daemon, disk_bytes(MICRO) // 2)
    assert not daemon.room.is_there()
    assert [has_weights(bench.store, key) for key in keys] == [False] * 3  # all that could go did
    assert f"of max_disk_gib = {disk_bytes(MICRO) / 2**31:g}" in message(bench)
    cap_at(daemon, cap)
    assert daemon.room.is_there()
    assert "disk" not in message(bench)


def test_the_oldest_go_first_and_no_more_than_needed(bench: Bench) -> None:
    bench.register()
    set_runner(bench, 'keep = "all"')
    keys = trained(bench, 4000, 3000, 2000)
    bench.enqueue(config=MICRO.model_dump())
    cap = disk_bytes(MICRO) + held_bytes(bench.store) - 4500
    daemon = bench.daemon()
    cap_at(daemon, cap)
    assert daemon.room.is_there()
    assert [has_weights(bench.store, key) for key in keys] == [False, False, True]


def test_nothing_is_claimed_until_there_is_room(bench: Bench, disk: Path) -> None:
    bench.register()
    key = bench.enqueue(config=MICRO.model_dump() | {"act": "train"})
    filler = disk / "a film"
    filler.write_bytes(bytes(50 * 2**20))
    bench.store.execute("UPDATE runs SET config = ? WHERE id = ?", (MICRO.model_dump_json(), key))
    daemon = bench.daemon()
    daemon.step(now())
    assert (bench.run(key).status, bench.attempts(key)) == ("queued", [])
    need = (disk_bytes(MICRO) + SPARE_BYTES) / 2**20
    assert message(bench) == (
        f"training on the CPU; disk: 14.0 MiB free of the {need:.1f} MiB needed: run {key} (train) writes up to "
        f"{disk_bytes(MICRO) / 2**20:.1f} MiB, and 32.0 MiB are for the rest; run blueberry clean, or free some space"
    )
    assert cancel_experiment_runs(bench.store, bench.experiment_id) == 1
    daemon.room.tidy()
    assert message(bench) == "training on the CPU"  # nothing waits for room any more

    key = bench.enqueue(config=MICRO.model_dump())
    bench.step_until(daemon, lambda: "disk: 14.0 MiB free" in message(bench), "it waits again")
    filler.unlink()
    bench.step_until(daemon, lambda: bench.attempts(key), "a claim")
    assert message(bench) == "training on the CPU"


def test_what_a_killed_daemon_left_is_done_by_the_next(bench: Bench) -> None:
    bench.register()
    marked, unmeasured = trained(bench, 2000, 1000)
    [first, second] = list_weights(bench.store)
    drop_weights(bench.store, [first.attempt_id])  # and killed before it deleted the file
    bench.store.execute("UPDATE attempts SET bytes = NULL, weights_bytes = NULL WHERE id = ?", (second.attempt_id,))
    torn = bench.directory(unmeasured) / ".checkpoint.pt.77.tmp"
    torn.touch()
    daemon = bench.daemon()
    set_runner(bench, 'keep = "all"')
    daemon.lab.settings = load_settings(daemon.lab.folder)
    daemon.room.tidy()
    assert not (bench.directory(marked) / "checkpoint.pt").exists()
    assert not torn.exists()
    assert [item.bytes for item in list_weights(bench.store)] == [1000]
    assert held_bytes(bench.store) == sum(size(bench.directory(key)) for key in (marked, unmeasured))


def test_a_log_without_end_keeps_its_beginning_and_its_last_lines(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("chatter")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "failed", "failed twice")
    log = bench.directory(key) / "log.txt"
    assert log.stat().st_size <= RUN_LOG_BYTES
    first, *_ = log.read_text().splitlines()
    assert first.startswith("the environment has")
    assert (bench.run(key).log_tail or "").endswith("x\nthe last line")


def test_an_attempt_without_a_result_leaves_no_weights(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue(config={"act": "crash", "weights": 1000})
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "failed", "failed twice")
    assert not list(bench.lab.runs_folder.glob("*/checkpoint.pt"))
    assert [attempt.weights_bytes for attempt in bench.attempts(key)] == [0, 0]
    assert [attempt.bytes for attempt in bench.attempts(key)] == [
        size(bench.lab.runs_folder / attempt.directory) for attempt in bench.attempts(key)
    ]
