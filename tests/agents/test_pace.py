"""How long both sides train: in every verdict, and in words only where it is clear."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agents.pace import pace
from agents.planner import enqueue
from db.comparisons import pairs
from db.lab import Lab
from db.records import Runner
from moe.config import Config
from tests.agents.test_post_runs import SMALLER, judged, served
from tests.agents.test_research import Scorer, approved, lr_matters, settled


def timed(ratio: float, spread: float) -> Scorer:
    """A world in which lr 0.02 helps and trains `ratio` times as long; the logarithm of that is further off by `spread`
    in each pair, up and down by turns, since the lab draws seeds and with them would draw luck."""
    turn: dict[int, int] = {}

    def score(config: Config, seed: int) -> dict[str, Any]:
        off = spread * (-1) ** turn.setdefault(seed, len(turn))
        seconds = 100.0 * (ratio * math.exp(off) if config.lr == 0.02 else 1.0)
        return {"val_bpb": lr_matters(config, seed), "train_seconds": seconds}

    return score


@pytest.mark.parametrize(
    ("baseline", "treatment", "differs"),
    [
        ([10.0, 10.2], [14.0, 14.4], True),
        ([14.0, 14.4], [10.0, 10.2], True),
        ([10.0, 10.2], [10.8, 11.0], False),  # too little to matter
        ([10.0, 15.0], [14.0, 16.0], False),  # it may be the machine
        ([6.3, 6.4, 11.0, 6.2, 6.4, 6.3], [10.9, 11.0, 11.2, 10.8, 11.0, 10.9], True),  # one was held up
        ([30.0, 30.0], [30.0, 30.0], False),
    ],
)
def test_a_pace_is_told_where_all_pairs_say_so(baseline: list[float], treatment: list[float], differs: bool) -> None:
    found = pace(list(zip(baseline, treatment, strict=True)))
    assert found is not None
    assert found.low <= found.ratio <= found.high
    assert found.differs == differs


@pytest.mark.parametrize("pairs", [[], [(10.0, 14.0)], [(10.0, 14.0), (0.0, 0.0)]])
def test_less_than_two_pairs_tell_nothing(pairs: list[tuple[float, float]]) -> None:
    assert pace(pairs) is None


def test_a_treatment_that_trains_longer_is_named_as_such(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, timed(1.4, 0.0))
    assert (verdict.said, verdict.pairs >= 2) == ("improved", True)
    assert "and takes 1.4 [1.4, 1.4] times as long to train" in verdict.sentence
    assert verdict.baseline_seconds is not None
    assert verdict.treatment_seconds == pytest.approx(1.4 * verdict.baseline_seconds)


def test_seconds_that_a_busy_machine_scatters_are_shown_and_not_said(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, timed(1.4, 1.0))
    assert "as long" not in verdict.sentence
    assert verdict.treatment_seconds is not None


def test_a_run_on_a_disturbed_card_does_not_count(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    run = pairs(lab.store, experiment.id)[0].treatment
    assert run is not None
    lab.store.execute("UPDATE runs SET disturbance = 'throttled' WHERE id = ?", (run.id,))

    def score(config: Config, seed: int) -> dict[str, float]:
        return {"val_bpb": lr_matters(config, seed), "train_seconds": 100.0 * seed}

    verdict = settled(lab, runner, experiment, score)
    assert (verdict.baseline_seconds, verdict.treatment_seconds) == (200.0, 200.0)
    assert "as long" not in verdict.sentence  # a screening may share baselines of another hour


def test_of_runs_on_a_checkpoint_the_training_counts(lab: Lab, runner: Runner) -> None:
    def score(config: Config, seed: int) -> dict[str, Any]:
        found = served(0.0)(config, seed)
        assert isinstance(found, dict)
        return found | ({"train_seconds": 30.0} if config.quantize == "none" else {})

    verdict = judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), score)
    assert (verdict.baseline_seconds, verdict.treatment_seconds) == (30.0, 30.0)
