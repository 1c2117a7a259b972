"""The line of queued runs: worth before size, everybody's turn comes, and what is shown is what happens."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from db.clock import Instant
from db.experiments import add_review, move_experiment
from db.order import (
    LEAST_SET_BACK,
    MOST_SET_BACK,
    PLACES_PER_DOUBLING,
    UNREVIEWED,
    head_of_line,
    next_run,
    place_of,
    set_back,
)
from db.queue import Outcome, cancel_experiment_runs, claim_run, finish_attempt, get_run, lose_attempt
from db.records import Attempt, Experiment

if TYPE_CHECKING:
    from tests.db.conftest import Filled

AT = Instant(seconds=1000.0, boot_id="boot")


def claim(filled: Filled) -> Attempt:
    claimed = claim_run(filled.store, filled.runner(), AT, lease_seconds=30.0)
    assert claimed is not None
    return claimed.attempt


def queue(filled: Filled, experiment: Experiment, name: str, seconds: float = 100.0, **columns: object) -> int:
    """A run of that fingerprint in the queue, expected to take so long; its id."""
    return filled.run(experiment, fingerprint=name, expected_seconds=seconds, **columns).run.id  # type: ignore[arg-type]


def review(filled: Filled, experiment: Experiment, probability: float) -> None:
    criteria = dict.fromkeys(("novelty", "feasibility", "impact", "clarity", "efficiency", "score"), 8.0)
    values = {"reviewer": "rubric", "decision": "approve", "feedback": "f", "facts": {}, **criteria}
    add_review(filled.store, {**values, "experiment_id": experiment.id, "success_probability": probability})


def line(filled: Filled) -> list[int]:
    return [place.run_id for place in head_of_line(filled.store, "cpu", limit=1000)]


def test_probes_then_what_many_wait_for_then_the_promising_and_the_short(filled: Filled) -> None:
    first, second, third = (filled.experiment() for _ in range(3))
    review(filled, first, 0.1)
    review(filled, second, 0.4)
    review(filled, third, 0.4)
    doubtful = queue(filled, first, "doubtful")
    long = queue(filled, second, "long", 1000.0)
    promising = queue(filled, third, "promising")
    baseline, *_ = [queue(filled, item, "baseline", arm="baseline") for item in (first, second, third)]
    probe = queue(filled, third, "probe", 5000.0, arm="probe", kind="probe")
    asked_for = queue(filled, first, "asked for", 1e6, priority=1)
    assert line(filled) == [asked_for, probe, baseline, promising, doubtful, long]
    assert [claim(filled).run_id for _ in range(6)] == [asked_for, probe, baseline, promising, doubtful, long]


def test_a_new_review_moves_what_waits(filled: Filled) -> None:
    first, second = filled.experiment(), filled.experiment()
    runs = [queue(filled, first, "a"), queue(filled, second, "b")]
    assert line(filled) == runs
    review(filled, second, 0.9)
    assert line(filled) == runs[::-1]
    place = place_of(filled.store, runs[1])
    assert place is not None
    assert (place.position, place.gains, place.seconds) == (1, 0.9, 100.0)
    assert place.why == "0.9 improvements expected for about 100 s"


def test_a_run_that_fewer_wait_for_goes_back(filled: Filled) -> None:
    first, second, third = (filled.experiment() for _ in range(3))
    alone = queue(filled, first, "alone")
    shared, _ = (queue(filled, item, "shared") for item in (second, third))
    assert line(filled) == [shared, alone]
    move_experiment(filled.store, third.id, "cancelled", allowed=["queued"])
    cancel_experiment_runs(filled.store, third.id)
    assert line(filled) == [alone, shared]


def test_many_experiments_interleave_with_one_of_many_seeds(filled: Filled) -> None:
    hog, modest = filled.experiment(), filled.experiment()
    for seed in range(20):
        filled.run(hog, seed, expected_seconds=100.0)

    short = {filled.run(modest, seed, fingerprint="m", expected_seconds=100.0).run.id for seed in range(2)}
    places = [position for position, run in enumerate(line(filled), 1) if run in short]
    assert places[0] <= 3
    assert places[1] <= 8


def test_nobody_is_overtaken_more_often_than_promised(filled: Filled) -> None:
    store, draw, runner = filled.store, random.Random(7), filled.runner()
    overtaken: dict[int, int] = {}
    with store.transaction():  # one commit: hundreds of them would measure the disk
        for item in (experiments := [filled.experiment() for _ in range(12)]):
            review(filled, item, draw.random())

        worst = queue(filled, experiments[0], "worst", 1e9)
        overtaken[worst] = most = 0
        while worst in overtaken:  # something better arrives before every claim, and now and then something worse
            for number in range(2 if draw.random() < 0.1 else 1):
                seconds = 10.0 ** draw.uniform(-1, 5) if number else draw.uniform(0.1, 1.0)
                overtaken[queue(filled, draw.choice(experiments), f"{len(overtaken)} {draw.random()}", seconds)] = 0

            [expected] = head_of_line(store, "cpu", limit=1)
            claimed = claim_run(store, runner, AT, lease_seconds=30.0)
            assert claimed is not None
            assert claimed.run.id == expected.run_id
            most = max(most, overtaken.pop(claimed.run.id))
            overtaken |= {run: times + 1 for run, times in overtaken.items() if run < claimed.run.id}

    assert 300 < most <= MOST_SET_BACK


def test_a_rival_must_promise_more_the_later_it_comes() -> None:
    for places in range(1, MOST_SET_BACK):
        needed = 2.0 ** (places / PLACES_PER_DOUBLING)
        for seconds in (10.0, 300.0, 7200.0):
            ahead = set_back("train", 0.3, seconds) - set_back("train", 0.3, seconds / needed)
            assert ahead <= places + 1

    assert set_back("train", 0.0, 1.0) <= MOST_SET_BACK
    assert set_back("train", 1.0, 0.0) == LEAST_SET_BACK
    assert set_back("probe", 0.0, 1e9) == 0


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_what_lost_its_runner_comes_back_to_its_place(filled: Filled, how: str) -> None:
    runs = [queue(filled, filled.experiment(), name) for name in ("a", "b")]
    attempt = claim(filled)
    assert line(filled) == runs[1:]
    if how == "lost":
        lose_attempt(filled.store, attempt, "killed", max_lost=3)
    else:
        finish_attempt(filled.store, attempt, Outcome(status="failed", error="e"), max_failures=2)

    assert line(filled) == runs


def test_a_revived_run_joins_the_line_at_its_end(filled: Filled) -> None:
    first, second = filled.experiment(), filled.experiment()
    runs = [queue(filled, first, "a"), queue(filled, second, "b")]
    finish_attempt(filled.store, claim(filled), Outcome(status="failed", error="e"), max_failures=1)
    queue(filled, first, "a")
    assert line(filled) == runs[::-1]


def test_only_what_could_start_has_a_place(filled: Filled) -> None:
    experiment = filled.experiment()
    probe = queue(filled, experiment, "p", arm="probe", kind="probe")
    train = queue(filled, experiment, "t", needs_run_id=probe)
    assert (line(filled), place_of(filled.store, train)) == ([probe], None)
    attempt = claim(filled)
    assert next_run(filled.store, "cpu") is None
    finish_attempt(filled.store, attempt, Outcome(status="completed", score={"passed": True}), max_failures=1)
    assert line(filled) == [train]
    later = queue(filled, experiment, "later", needs_run_id=probe)
    assert line(filled) == [train, later]
    assert get_run(filled.store, later).status == "queued"


def test_positions_agree_with_the_line_and_the_view(filled: Filled) -> None:
    draw = random.Random(3)
    for name in range(40):
        queue(filled, filled.experiment(), str(name), 10 ** draw.uniform(0, 4), priority=draw.choice([-1, 0, 0, 2]))

    queue(filled, filled.experiment(), "elsewhere", hardware_class="Tesla T4", priority=9)
    shown = line(filled)
    assert [getattr(place_of(filled.store, run), "position", None) for run in shown] == list(range(1, 41))
    rows = filled.store.rows("SELECT run_id FROM queue_order WHERE hardware_class = 'cpu' ORDER BY position")
    assert [row["run_id"] for row in rows] == shown
    assert [claim(filled).run_id for _ in shown] == shown


def test_expected_seconds_are_those_of_earlier_runs_of_the_kind(filled: Filled) -> None:
    experiment = filled.experiment()
    before = place_of(filled.store, filled.run(experiment, fingerprint="a").run.id)
    assert before is not None
    assert (before.seconds, before.gains) == (600.0, UNREVIEWED)
    finish_attempt(filled.store, claim(filled), Outcome(status="completed", score={}), max_failures=1)
    filled.store.execute("UPDATE attempts SET started_at = '2026-01-01T00:00:00Z', ended_at = '2026-01-01T00:00:30Z'")
    after = place_of(filled.store, filled.run(experiment, fingerprint="b").run.id)
    assert after is not None
    assert after.seconds == pytest.approx(30.0, abs=0.01)
