"""The queue and the protocol of attempts: one winner, one result, no late writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.clock import Instant
from db.errors import FencedError, NotFoundError
from db.experiments import experiments_to_judge, get_experiment, mark_judged, move_experiment
from db.lab import Lab
from db.queries import completed_directory, curve, experiment_seconds, metric_names, running_runs
from db.queue import (
    Outcome,
    Point,
    add_run,
    adopt_attempt,
    cancel_experiment_runs,
    claim_run,
    count_queued,
    finish_attempt,
    get_attempt,
    get_run,
    ingest,
    live_attempts,
    lose_attempt,
    prioritize_experiment,
    put_back,
)
from db.records import Attempt, Run

if TYPE_CHECKING:
    from tests.db.conftest import Filled

ROOT = Path(__file__).parents[2]
AT = Instant(seconds=1000.0, boot_id="boot")
LEASE = 30.0

CLAIM_ALL = """
import sys
from pathlib import Path
from db.clock import now
from db.lab import Lab
from db.queue import Outcome, claim_run, finish_attempt
from db.runners import get_runner
store = Lab(Path(sys.argv[1])).store
runner = get_runner(store, 1)
input()
while claim := claim_run(store, runner, now(), lease_seconds=30.0):
    finish_attempt(store, claim.attempt, Outcome(status="completed", score={"val_bpb": 2.0}), max_failures=2)
    print(claim.run.id)
"""


def claim(filled: Filled) -> Attempt:
    claimed = claim_run(filled.store, filled.runner(), AT, lease_seconds=LEASE)
    assert claimed is not None
    return claimed.attempt


def finish(filled: Filled, attempt: Attempt, **outcome: object) -> Run:
    values = {"status": "completed", "score": {"val_bpb": 2.0}} | outcome
    return finish_attempt(filled.store, attempt, Outcome(**values), max_failures=2)  # type: ignore[arg-type]


def test_four_processes_claim_every_run_once(filled: Filled) -> None:
    experiment = filled.experiment()
    runs = [filled.run(experiment, seed).run.id for seed in range(60)]
    filled.runner()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, str(filled.lab.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()

    claimed = [int(line) for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(claimed) == runs
    assert filled.store.value("SELECT count(*) FROM attempts") == len(runs)


def test_best_run_first_and_only_of_ones_own_class(filled: Filled) -> None:
    experiment = filled.experiment()
    low, high = filled.run(experiment, 0), filled.run(experiment, 1, priority=5)
    filled.run(experiment, 2, hardware_class="Tesla T4", priority=9)
    assert count_queued(filled.store) == 3
    assert count_queued(filled.store, "cpu") == 2
    assert [claim(filled).run_id, claim(filled).run_id] == [high.run.id, low.run.id]
    assert claim_run(filled.store, filled.runner(), AT, lease_seconds=LEASE) is None
    assert get_experiment(filled.store, experiment.id).status == "running"


def test_prioritized_experiment_goes_first_and_its_probe_before_all(filled: Filled) -> None:
    first, second = filled.experiment(), filled.experiment()
    filled.run(first, 0, priority=7)
    train = filled.run(second, 1)
    probe = filled.run(second, 2, arm="probe", kind="probe")
    assert prioritize_experiment(filled.store, second.id) == 2
    assert [claim(filled).run_id, claim(filled).run_id] == [probe.run.id, train.run.id]


def test_equal_runs_are_shared_between_experiments(filled: Filled) -> None:
    first, second = filled.experiment(), filled.experiment()
    made, shared = filled.run(first, arm="baseline"), filled.run(second, arm="baseline", priority=3)
    assert (made.new, shared.new) == (True, False)
    assert made.run.id == shared.run.id
    assert get_run(filled.store, made.run.id).priority == 3
    finish(filled, claim(filled))
    assert filled.run(filled.experiment(), arm="baseline").new is False
    assert get_run(filled.store, made.run.id).status == "completed"


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_run_without_a_result_is_revived(filled: Filled, status: str) -> None:
    experiment = filled.experiment()
    run = filled.run(experiment).run
    for _ in range(2 if status == "failed" else 1):
        finish(filled, claim(filled), status=status, score=None, error="boom")

    assert get_run(filled.store, run.id).status == status
    revived = filled.run(filled.experiment())
    assert (revived.new, revived.run.id) == (True, run.id)
    again = get_run(filled.store, run.id)
    assert (again.status, again.failures, again.error, again.ended_at) == ("queued", 0, None, None)
    finish(filled, claim(filled))
    assert get_run(filled.store, run.id).status == "completed"


def test_needed_run_must_have_completed_and_passed(filled: Filled) -> None:
    experiment = filled.experiment()
    probes = [filled.run(experiment, seed, arm="probe", kind="probe").run for seed in range(2)]
    trains = [filled.run(experiment, seed, needs_run_id=probe.id).run for seed, probe in enumerate(probes)]
    first, second = claim(filled), claim(filled)
    assert (first.run_id, second.run_id) == (probes[0].id, probes[1].id)
    assert claim_run(filled.store, filled.runner(), AT, lease_seconds=LEASE) is None
    assert finish(filled, first, score={"passed": False}).passed is False
    assert claim_run(filled.store, filled.runner(), AT, lease_seconds=LEASE) is None
    assert finish(filled, second, score={"passed": True}).passed is True
    assert claim(filled).run_id == trains[1].id


@pytest.mark.parametrize("status", ["pruned", "failed", "cancelled"])
def test_what_waits_for_a_checkpoint_ends_with_the_run_that_left_none(filled: Filled, status: str) -> None:
    experiment = filled.experiment()
    training = filled.run(experiment, arm="checkpoint").run
    waiting = filled.run(experiment, kind="post", needs_run_id=training.id).run
    outcome = Outcome(status=status, error="it went wrong")  # type: ignore[arg-type]  # one of the three
    finish_attempt(filled.store, claim(filled), outcome, max_failures=1)
    ended = get_run(filled.store, waiting.id)
    assert (ended.status, ended.error) == (status, f"run {training.id} left no checkpoint: it went wrong")

    later = filled.run(experiment, kind="post", fingerprint="g", needs_run_id=training.id).run
    assert later.status == status


def test_what_waits_for_a_checkpoint_is_cancelled_once(filled: Filled) -> None:
    experiment = filled.experiment()
    training = filled.run(experiment, arm="checkpoint").run
    waiting = filled.run(experiment, kind="post", needs_run_id=training.id).run
    cancel_experiment_runs(filled.store, experiment.id)
    assert get_run(filled.store, waiting.id).status == "cancelled"
    assert filled.store.value("SELECT count(*) FROM events WHERE run_id = ?", (waiting.id,)) == 1


def test_a_checkpoint_is_where_its_run_was_completed(filled: Filled) -> None:
    run = filled.run(filled.experiment()).run
    assert completed_directory(filled.store, run.id) is None
    lose_attempt(filled.store, claim(filled), "killed", max_lost=2)
    finish_attempt(filled.store, claim(filled), Outcome(status="completed", score={}), max_failures=1)
    assert completed_directory(filled.store, run.id) == f"{run.id}-2"


def test_late_writer_is_fenced(filled: Filled) -> None:
    run = filled.run(filled.experiment()).run
    old = claim(filled)
    other = filled.runner("other")
    new = adopt_attempt(filled.store, old, other, AT, lease_seconds=LEASE)
    assert (new.id, new.token, new.runner_id) == (old.id, old.token + 1, other.id)

    point = Point(step=1, tokens=1, seconds=1.0, values={"loss": 1.0})
    late: list[Callable[[], object]] = [
        lambda: ingest(filled.store, old, [point], 10, AT, lease_seconds=LEASE),
        lambda: finish(filled, old),
        lambda: lose_attempt(filled.store, old, "x", max_lost=3),
        lambda: put_back(filled.store, old, "x"),
        lambda: adopt_attempt(filled.store, old, other, AT, lease_seconds=LEASE),
    ]
    for write in late:
        with pytest.raises(FencedError):
            write()

    assert get_attempt(filled.store, old.id) == new
    assert metric_names(filled.store, run.id) == []
    finish(filled, new)
    with pytest.raises(FencedError):
        finish(filled, new)

    assert filled.store.value("SELECT count(*) FROM events WHERE kind = 'ended'") == 1


def test_points_offset_and_lease_are_stored_together(filled: Filled) -> None:
    run = filled.run(filled.experiment()).run
    attempt = claim(filled)
    points = [
        Point(step=1, tokens=10, seconds=0.5, values={"train_loss": 3.0, "val_bpb": 4.0}),
        Point(step=2, tokens=20, seconds=1.0, values={"train_loss": None}),
    ]
    later = Instant(seconds=1010.0, boot_id="boot")
    assert ingest(filled.store, attempt, points, 99, later, lease_seconds=LEASE) is False
    stored = get_attempt(filled.store, attempt.id)
    assert (stored.metrics_offset, stored.lease_until) == (99, 1040.0)
    row = get_run(filled.store, run.id)
    assert (row.step, row.tokens, row.seconds, row.train_loss, row.val_bpb) == (2, 20, 1.0, 3.0, 4.0)
    assert [(p.step, p.value) for p in curve(filled.store, run.id, "train_loss")] == [(1, 3.0), (2, None)]
    flags = filled.store.rows("SELECT step, non_finite FROM metric_points WHERE name = 'train_loss' ORDER BY step")
    assert [tuple(flag.values()) for flag in flags] == [(1, 0), (2, 1)]
    (progress,) = running_runs(filled.store)
    assert (progress.step, progress.seconds_left, progress.tokens_per_second) == (2, 19.0, 20.0)


def test_failures_and_losses_are_counted_apart(filled: Filled) -> None:
    run = filled.run(filled.experiment()).run
    assert lose_attempt(filled.store, claim(filled), "killed", max_lost=3).status == "queued"
    assert put_back(filled.store, claim(filled), "stopped").status == "queued"
    assert finish(filled, claim(filled), status="failed", score=None, error="e", log_tail="tail").status == "queued"
    assert lose_attempt(filled.store, claim(filled), "killed", max_lost=3).status == "queued"
    assert finish(filled, claim(filled), status="failed", score=None, error="e2").status == "failed"
    ended = get_run(filled.store, run.id)
    assert (ended.failures, ended.lost, ended.error, ended.log_tail) == (2, 2, "e2", "tail")
    statuses = [row["status"] for row in filled.store.rows("SELECT status FROM attempts ORDER BY id")]
    assert statuses == ["lost", "cancelled", "failed", "lost", "failed"]
    assert live_attempts(filled.store) == []


def test_clock_that_is_set_back_makes_no_duration_negative(filled: Filled) -> None:
    experiment = filled.experiment()
    filled.run(experiment)
    attempt = claim(filled)
    filled.store.execute("UPDATE attempts SET started_at = '2999-01-01T00:00:00.000Z'")
    finish(filled, attempt)
    assert get_attempt(filled.store, attempt.id).ended_at == "2999-01-01T00:00:00.000Z"
    assert experiment_seconds(filled.store, experiment.id) == 0.0


def test_lost_too_often_is_failed(filled: Filled) -> None:
    filled.run(filled.experiment())
    assert lose_attempt(filled.store, claim(filled), "killed", max_lost=2).status == "queued"
    assert lose_attempt(filled.store, claim(filled), "killed", max_lost=2).status == "failed"


def test_cancelling_spares_what_others_share(filled: Filled) -> None:
    mine, theirs = filled.experiment(), filled.experiment()
    shared = filled.run(mine, 0, arm="baseline").run
    filled.run(theirs, 0, arm="baseline")
    running, queued = filled.run(mine, 1, priority=9).run, filled.run(mine, 2).run
    attempt = claim(filled)
    assert attempt.run_id == running.id
    assert cancel_experiment_runs(filled.store, mine.id) == 2
    assert [get_run(filled.store, run.id).status for run in (shared, running, queued)] == [
        "queued", "running", "cancelled",
    ]  # fmt: skip
    assert ingest(filled.store, attempt, [], 0, AT, lease_seconds=LEASE) is True
    assert put_back(filled.store, attempt, "stopped").status == "cancelled"

    move_experiment(filled.store, theirs.id, "cancelled", allowed=("queued", "running"))
    assert cancel_experiment_runs(filled.store, mine.id) == 1
    assert get_run(filled.store, shared.id).status == "cancelled"


def test_run_about_to_be_cancelled_is_kept_for_whoever_asks_for_it_now(filled: Filled) -> None:
    mine = filled.experiment()
    run = filled.run(mine).run
    attempt = claim(filled)
    cancel_experiment_runs(filled.store, mine.id)
    assert filled.run(filled.experiment()).new is False
    assert ingest(filled.store, attempt, [], 0, AT, lease_seconds=LEASE) is False
    assert lose_attempt(filled.store, attempt, "ended", max_lost=3).status == "queued"
    assert get_run(filled.store, run.id).cancel_requested is False


def test_experiment_is_judged_after_each_end_of_a_run(filled: Filled) -> None:
    store, experiment, other = filled.store, filled.experiment(), filled.experiment()
    for seed in range(2):
        filled.run(experiment, seed)

    filled.run(other, 1)  # shared, so it goes first
    assert experiments_to_judge(store) == []
    finish(filled, claim(filled))
    assert [e.id for e in experiments_to_judge(store)] == [experiment.id, other.id]
    mark_judged(store, experiment.id)
    assert [e.id for e in experiments_to_judge(store)] == [other.id]
    finish(filled, claim(filled))
    assert [e.id for e in experiments_to_judge(store)] == [experiment.id, other.id]
    move_experiment(store, other.id, "concluded", allowed=("running", "queued"))
    assert [e.id for e in experiments_to_judge(store)] == [experiment.id]
    mark_judged(store, experiment.id)
    filled.run(experiment, 1, arm="baseline", fingerprint="new")
    assert experiments_to_judge(store) == []
    third = filled.experiment()
    filled.run(third, 0)  # has ended already
    assert [e.id for e in experiments_to_judge(store)] == [third.id]


def test_run_needs_an_experiment_that_exists(filled: Filled) -> None:
    values = {"kind": "train", "fingerprint": "f", "seed": 0, "hardware_class": "cpu", "code": "c", "config": {}}
    values |= {"priority": 0}
    with pytest.raises(Exception, match="FOREIGN KEY"):
        add_run(filled.store, 999, "baseline", values)

    assert count_queued(filled.store) == 0
    with pytest.raises(NotFoundError, match="there is no run 999"):
        get_run(filled.store, 999)


def test_threads_have_connections_of_their_own(filled: Filled) -> None:
    other = Lab(filled.lab.folder)
    assert other.store is other.store
    assert other.store is not filled.store
    other.close()
