"""A run whose training process is killed goes on in its next attempt, and its checkpoints go when it has ended."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from db.clock import now
from db.processes import FileLock
from db.queries import curve
from db.queue import cancel_experiment_runs
from gpu_runner.resume import drop_checkpoints, find_earlier
from moe.config import apply
from moe.presets import PRESETS

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

STEPS = 400
LONG = apply(PRESETS["nano"], {"budget_tokens": 512 * STEPS})


@pytest.mark.timeout(400)
def test_killed_run_goes_on_in_its_next_attempt(bench: Bench) -> None:
    key = bench.enqueue(config=LONG.model_dump(), steps=STEPS)
    bench.start(standin=False)
    bench.until_training(key, step=20)
    os.kill(bench.child_pid(key), signal.SIGTERM)  # as a machine does that is about to be taken away
    bench.until(lambda: bench.run(key).status == "completed", "completed", seconds=240)  # torch starts four times

    assert bench.statuses(key) == ["lost", "completed"]
    first, second = (bench.lab.runs_folder / attempt.directory for attempt in bench.attempts(key))
    before = (first / "metrics.jsonl").read_text()
    last = json.loads(before.splitlines()[-1])["step"]
    assert 20 <= last < STEPS
    assert (second / "log.txt").read_text() == f"resumed at step {last} from {first}\n"
    assert (second / "metrics.jsonl").read_text().startswith(before)
    steps = [point.step for point in curve(bench.store, key, "train_loss")]
    assert steps == [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert {1, *range(STEPS // 20, STEPS + 1, STEPS // 20)} <= set(steps)
    bench.until(lambda: not list(bench.lab.runs_folder.glob("*/*resume-*")), "the checkpoints gone")
    assert (second / "checkpoint.pt").exists()


def test_earlier_attempt_is_the_newest_that_is_dead_and_left_a_checkpoint(bench: Bench) -> None:
    folder = bench.lab.runs_folder
    for name in ("7-1", "7-2", "7-4", "7-5", "77-3"):
        (folder / name).mkdir()
        (folder / name / "resume-000000010.pt").touch()

    (folder / "7-5" / "resume-000000010.pt").unlink()
    assert find_earlier(folder, 8, 3) is None
    assert find_earlier(folder, 7, 1) is None
    assert find_earlier(folder, 7, 4) == folder / "7-2"
    assert not list((folder / "7-1").iterdir())  # what 7-2 had taken over
    with FileLock(folder / "7-4" / "lock") as lock:
        assert lock.acquire()
        assert find_earlier(folder, 7, 6) == folder / "7-2"

    assert find_earlier(folder, 7, 6) == folder / "7-4"
    drop_checkpoints(folder, 7, before=6)
    assert {path.parent.name for path in folder.glob("*/resume-*")} == {"77-3"}


def test_checkpoints_go_when_a_run_is_cancelled_that_waits_to_go_on(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    checkpoint = bench.directory(key) / "resume-000000010.pt"
    checkpoint.touch()
    daemon.begin_stop(now())
    bench.step_until(daemon, lambda: bench.run(key).status == "queued", "put back")
    daemon.room.tidy()
    assert checkpoint.exists()
    assert cancel_experiment_runs(bench.store, bench.experiment_id) == 1
    daemon.room.tidy()
    assert not checkpoint.exists()
    assert (bench.attempts(key)[0].bytes or 0) > 0
