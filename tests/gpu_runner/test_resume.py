"""A run whose training process is killed goes on in its next attempt, and its checkpoints go when it has ended."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

from db.clock import now
from db.processes import FileLock
from db.queries import curve
from db.queue import Outcome, claim_run, finish_attempt
from gpu_runner.resume import drop_checkpoints, drop_ended, find_earlier
from moe.config import apply
from moe.presets import PRESETS

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

STEPS = 400
LONG = apply(PRESETS["nano"], {"budget_tokens": 512 * STEPS})


def test_killed_run_goes_on_in_its_next_attempt(bench: Bench) -> None:
    key = bench.enqueue(config=LONG.model_dump(), steps=STEPS)
    bench.start(standin=False)
    bench.until_training(key, step=20)
    os.kill(bench.child_pid(key), signal.SIGTERM)  # as a machine does that is about to be taken away
    bench.until_status(key, "completed")

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


def test_starting_daemon_drops_the_checkpoints_of_runs_that_have_ended(bench: Bench) -> None:
    bench.register()
    ended, waiting = bench.enqueue(), bench.enqueue()
    runner = bench.daemon().runner
    claim = claim_run(bench.store, runner, now(), lease_seconds=60)
    assert claim is not None
    assert claim.run.id == ended
    finish_attempt(bench.store, claim.attempt, Outcome(status="completed", score={"val_bpb": 1.5}), max_failures=1)
    for name in (f"{ended}-1", f"{waiting}-1", "999-1", "a folder of the user's"):
        (bench.lab.runs_folder / name).mkdir()
        (bench.lab.runs_folder / name / "resume-000000010.pt").touch()

    drop_ended(bench.store, bench.lab.runs_folder)
    left = {path.parent.name for path in bench.lab.runs_folder.glob("*/resume-*")}
    assert left == {f"{waiting}-1", "999-1", "a folder of the user's"}
