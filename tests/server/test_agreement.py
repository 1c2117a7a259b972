"""When a second result is the same: guards, measured speeds, runs that were stopped, verdicts on other machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.agreement import Agreement, compare
from agents.reproduction import Rerun
from db.experiments import add_verdict
from db.lab import Lab
from db.queue import Outcome, get_run
from db.records import Arm
from tests.server.conftest import made_lab, put_experiment, put_run
from tests.server.test_cli import verdict_of
from tests.server.test_report import finish

Score = dict[str, float] | None
ARMS: tuple[Arm, Arm] = ("baseline", "treatment")
SEEDS = (5, 6)
SMALLER = {"metric": "weight_bytes", "guard_metric": "val_bpb", "guard_margin": 0.02}
FASTER = {"metric": "decode_tokens_per_second", "direction": "higher", "guard_metric": "val_bpb", "guard_margin": 0.02}


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path / "other") as other:
        yield other


def score(lab: Lab, values: tuple[Score, Score], **question: Any) -> None:
    """Two pairs with these scores, baseline and treatment; None is a run that diverged."""
    experiment = put_experiment(lab, **question)
    for seed in SEEDS:
        for arm, value in zip(ARMS, values, strict=True):
            put_run(lab, experiment.id, seed, arm=arm, fingerprint=arm.ljust(16, "0"))
            diverged = Outcome(status="pruned", error="diverged")
            finish(lab, diverged if value is None else Outcome(status="completed", score=value))


def judge(lab: Lab, **found: Any) -> None:
    """A screening's verdict on experiment 1."""
    add_verdict(lab.store, verdict_of(1) | {"noise_df": 12.0, "screening": "promising", "stage": "screen"} | found)


def compared(lab: Lab, other: Lab) -> Agreement:
    """The agreement of all runs of experiment 1, in both labs in the same order."""
    runs = [get_run(lab.store, key) for key in (1, 2, 3, 4)]
    reruns = [Rerun(arm=ARMS[place % 2], run=run, again=run.id) for place, run in enumerate(runs)]
    return compare(lab, other, 1, reruns, [])


def elsewhere(other: Lab) -> None:
    """The second lab is on another machine."""
    other.store.execute("UPDATE runners SET hostname = 'there'")


def small(val_bpb: float) -> tuple[Score, Score]:
    """What int8 brings: a quarter of the bytes, at this val_bpb."""
    return {"weight_bytes": 100_000.0, "val_bpb": 2.1}, {"weight_bytes": 25_000.0, "val_bpb": val_bpb}


@pytest.mark.parametrize(("off", "reproduced"), [(0.0, True), (1e-15, False)])
def test_the_guard_has_to_come_out_the_same_too(lab: Lab, other: Lab, off: float, reproduced: bool) -> None:
    score(lab, small(2.11), **SMALLER)
    score(other, small(2.11 + off), **SMALLER)
    judge(lab, effect=-75_000.0, noise=0.0, guard_effect=0.01, guard_low=0.005, guard_high=0.015)
    agreement = compared(lab, other)
    assert (agreement.exact, agreement.reproduced) == (True, reproduced)


@pytest.mark.parametrize(("val_bpb", "reproduced"), [(2.151, True), (2.111, False)])
def test_worse_because_of_the_guard_has_to_be_so_again(lab: Lab, other: Lab, val_bpb: float, reproduced: bool) -> None:
    score(lab, small(2.15), **SMALLER)
    score(other, small(val_bpb), **SMALLER)
    elsewhere(other)
    judge(lab, verdict="worse", effect=-75_000.0, noise=0.0, guard_effect=0.05, guard_low=0.04, guard_high=0.06)
    assert compared(lab, other).reproduced == reproduced


@pytest.mark.parametrize(
    ("speed", "val_bpb", "reproduced"), [(91.0, 2.11, True), (40.0, 2.11, False), (91.0, 2.1100001, False)]
)
def test_a_speed_agrees_within_the_noise_and_its_guard_to_the_last_bit(
    lab: Lab, other: Lab, speed: float, val_bpb: float, reproduced: bool
) -> None:
    def fast(speed: float, val_bpb: float) -> tuple[Score, Score]:
        key = "decode_tokens_per_second"
        return {key: 70.0, "val_bpb": 2.1}, {key: speed, "val_bpb": val_bpb}

    score(lab, fast(90.0, 2.11), **FASTER)
    score(other, fast(speed, val_bpb), **FASTER)
    found = {"effect": 20.0, "low": 14.0, "high": 26.0, "noise": 3.0}
    judge(lab, **found, guard_effect=0.01, guard_low=0.005, guard_high=0.015)
    agreement = compared(lab, other)
    assert agreement.reproduced == reproduced
    assert "is a speed, which no machine repeats exactly" in agreement.sentence


@pytest.mark.parametrize("same", [True, False])
def test_a_run_that_was_stopped_is_compared_where_it_was_stopped(lab: Lab, other: Lab, same: bool) -> None:
    score(lab, ({"val_bpb": 2.1}, None))
    score(other, ({"val_bpb": 2.1}, {"val_bpb": 3.0}))
    lab.store.execute("UPDATE runs SET beaten_by = 1 WHERE status = 'pruned'")
    if not same:
        other.store.execute("UPDATE metrics SET value = value + 1e-12 WHERE step = 40")

    judge(lab, screening="not promising", effect=None, low=None, high=None, noise=0.004)
    agreement = compared(lab, other)
    assert agreement.reproduced == same
    assert [run.metric.before for run in agreement.runs] == [2.1, 0.1, 2.1, 0.1]


@pytest.mark.parametrize(("df", "reproduced"), [(1.0, True), (12.0, False)])
def test_a_noise_that_is_known_from_little_allows_more(lab: Lab, other: Lab, df: float, reproduced: bool) -> None:
    score(lab, ({"val_bpb": 2.1}, {"val_bpb": 2.08}))
    score(other, ({"val_bpb": 2.13}, {"val_bpb": 2.11}))
    elsewhere(other)
    judge(lab, verdict="no evidence yet", effect=-0.02, low=-0.1, high=0.06, noise=0.004, noise_df=df)
    assert compared(lab, other).reproduced == reproduced


def test_a_treatment_that_diverges_again_elsewhere_is_a_reproduction(lab: Lab, other: Lab) -> None:
    score(lab, ({"val_bpb": 2.1}, None))
    score(other, ({"val_bpb": 2.1001}, None))
    elsewhere(other)
    judge(lab, screening="not promising", effect=None, low=None, high=None, noise=0.004)
    assert compared(lab, other).reproduced


def test_one_that_ends_elsewhere_where_it_diverged_is_none(lab: Lab, other: Lab) -> None:
    score(lab, ({"val_bpb": 2.1}, None))
    score(other, ({"val_bpb": 2.1}, {"val_bpb": 2.2}))
    elsewhere(other)
    judge(lab, screening="not promising", effect=None, low=None, high=None, noise=0.004)
    assert not compared(lab, other).reproduced
