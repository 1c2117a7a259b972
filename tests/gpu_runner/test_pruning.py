"""Treatments that cannot win are stopped by comparison with their baseline; nothing else is."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from db.experiments import move_experiment
from db.store import to_column
from gpu_runner.pruning import behind, spread

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

BASELINE = [4.0, 3.6, 3.4, 3.3, 3.2, 3.15, 3.12, 3.1]
NOISE = [0.02] * 8


def late_by(*steps: float) -> list[float | None]:
    """A curve that is behind by so much at its first points."""
    return [value + late for value, late in zip(BASELINE, steps, strict=False)]


@pytest.mark.parametrize(
    ("curve", "point"),
    [
        (late_by(2.0), None),  # every run gets a quarter of its budget
        (late_by(2.0, 2.0), 2),
        (late_by(2.0, 0.1, 2.0), None),  # two points in a row
        (late_by(2.0, 0.1, 2.0, 2.0), 4),
        (late_by(0.4, 0.2, 0.1, 0.05, 0.02), None),  # starts behind and catches up
        (late_by(0.0, 0.0, 0.0, 0.0, 0.1, 0.14, 0.17), 7),  # starts well and falls behind
        (late_by(*[2.0] * 8), None),  # done: there is nothing left to save
        ([*late_by(2.0, 2.0), None], None),
        ([], None),
    ],
)
def test_a_curve_is_stopped_where_it_cannot_win(curve: list[float | None], point: int | None) -> None:
    found = behind(curve, BASELINE, NOISE)
    assert (found and found.point) == point


def test_noise_that_is_hardly_known_makes_a_wide_margin() -> None:
    pair = [[3.0, 2.0], [3.2, 2.2]]
    assert spread([], 2) == [math.inf] * 2
    assert spread([pair], 2) == [math.inf] * 2
    assert spread([pair] * 20, 2)[0] == pytest.approx(0.1414 * 1.36, rel=0.01)
    assert spread([pair] * 2, 2)[0] > 0.1414 * 4
    assert spread([pair], 3) == [math.inf] * 3


def test_a_treatment_that_cannot_win_is_stopped_and_says_why(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue_race(behind=2.0)
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "pruned", "the run stopped")
    run = bench.run(key)
    assert run.beaten_by == bench.store.value("SELECT id FROM runs WHERE seed = 1 AND fingerprint LIKE 'baseline%'")
    said = (
        r"stopped at (25|38|50)% of its budget: val_bpb 5\.\d+ is 1\.999 behind run 1, the baseline of seed 1, where "
    )
    assert re.match(said, run.error or "")
    assert bench.statuses(key) == ["completed"]
    bench.assert_ended_once(key, "pruned")


def test_a_treatment_that_may_win_is_not(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue_race(behind=0.1, points=8, act="train")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")


def test_pruning_can_be_switched_off(bench: Bench) -> None:
    path = bench.lab.folder / "blueberry.toml"
    path.write_text(path.read_text() + "prune = false\n")
    bench.register()
    key = bench.enqueue_race(behind=2.0, points=8, act="train")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")


@pytest.mark.parametrize(
    "spared",
    [
        {"metric": "dead_experts"},
        {"confirm": "always"},
        {"purpose": "confirm"},
        {"seed": 4},
        {"config": {"schedule": "wsd"}},
        {"arm": "baseline"},
    ],
    ids=["another metric", "always confirmed", "a confirmation", "no such baseline", "another schedule", "a baseline"],
)
def test_a_run_is_spared_where_the_curve_does_not_decide(bench: Bench, spared: dict[str, Any]) -> None:
    columns = {name: spared[name] for name in ("metric", "confirm") if name in spared}
    bench.register()
    hopeless = bench.enqueue_race(behind=2.0, points=8, act="train", **columns)
    if "arm" in spared:  # of another question, which needs it whole
        asked = bench.enqueue_race(behind=0.0, points=8, act="train")
        row = bench.run(hopeless)
        assert bench.enqueue(arm="baseline", fingerprint=row.fingerprint, seed=1, config=row.config) == hopeless
        assert asked != hopeless

    run = bench.run(hopeless)
    config = {**run.config, **spared.get("config", {})}
    bench.store.execute(
        "UPDATE runs SET purpose = ?, seed = ?, config = json_patch(config, ?) WHERE id = ?",
        (spared.get("purpose", "screen"), spared.get("seed", 1), to_column(config), hopeless),
    )
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(hopeless).status == "completed", "the run done")


def test_a_run_that_was_stopped_is_done_whole_for_another_question(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue_race(behind=2.0)
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "pruned", "the run stopped")
    stopped = bench.run(key)
    move_experiment(bench.store, bench.experiment_id, "concluded", allowed=["running"])

    again: dict[str, Any] = {"fingerprint": stopped.fingerprint, "seed": stopped.seed, "config": stopped.config}
    assert bench.enqueue(**again) == key
    assert bench.run(key).status == "pruned"  # the question is the same
    bench.experiment_id = 0
    assert bench.enqueue(arm="baseline", **again) == key
    run = bench.run(key)
    assert (run.status, run.beaten_by, run.error) == ("queued", None, None)
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
