"""Screening on a part of the budget: it ranks, claims nothing, and is never mistaken for the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agents import mind
from agents.agreement import compare
from agents.class_noise import noise_here
from agents.planner import Plan, enqueue
from agents.reproduction import queue_again
from db.comparisons import pairs, scored_pairs
from db.errors import RefusedError
from db.experiments import get_experiment, list_insights
from db.hypotheses import get_hypothesis
from db.lab import Lab
from db.queries import probe_runs
from db.records import Experiment, Runner
from moe.accounting import account
from moe.config import Config, apply
from moe.presets import PRESETS
from tests.agents.test_research import approved, luck, settled, verdict_of, work_off

WHOLE = PRESETS["nano"].budget_tokens or 0
RUNG = "screen_share = 0.25\n"


def world(config: Config, seed: int) -> float:
    """lr 0.02 helps at any length, beta1 0.8 only in a short training, beta2 0.98 and lr 0.011 never."""
    short = (config.budget_tokens or WHOLE) < WHOLE
    effect = -0.2 if config.lr > 0.015 else 0.02 if config.lr > 0.01 or config.beta2 == 0.98 else 0.0
    if config.beta1 == 0.8:
        effect += -0.2 if short else 0.1

    scatter = 0.006 if short else 0.002
    return 3.0 + short + 0.01 * luck(seed) + effect + scatter * luck(seed, config.lr, config.beta1, config.beta2, short)


@pytest.fixture
def lab(configured: Callable[[str], Lab]) -> Lab:
    """A lab that screens at a quarter of the budget."""
    return configured(RUNG)


def planned(lab: Lab, experiment: Experiment, *, seeds: int | None = None) -> Plan:
    """The plan of an experiment that goes into the queue."""
    (plan,) = enqueue(lab, [experiment.id], seeds=seeds).plans
    return plan


def budgets(lab: Lab, experiment: Experiment, stage: str) -> set[object]:
    """The tokens that the runs of a stage are trained on."""
    found = [pair for pair in pairs(lab.store, experiment.id) if pair.stage == stage]
    return {run.config["budget_tokens"] for pair in found for run in (pair.baseline, pair.treatment) if run}


def test_a_gain_is_screened_short_and_confirmed_on_the_whole_budget(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    plan = planned(lab, experiment)
    assert "screened on 2 pairs at 1/4 of the budget (5,120 tokens a run): that ranks, no more" in plan.notes
    work_off(lab, runner, world)
    mind.work(lab)
    screening = verdict_of(lab, experiment)
    assert (screening.said, screening.share, screening.expected) == ("promising", 0.25, None)
    assert "over 2 screening pairs at 1/4 of the budget" in screening.sentence
    assert screening.treatment_flops == account(apply(PRESETS["nano"], {"budget_tokens": WHOLE // 4})).flops

    verdict = settled(lab, runner, experiment, world)
    assert (verdict.said, verdict.share) == ("improved", 1.0)
    assert "of the budget" not in verdict.sentence
    assert budgets(lab, experiment, "screen") == {WHOLE // 4}
    assert budgets(lab, experiment, "confirm") == {WHOLE}
    assert len(probe_runs(lab.store, experiment.id)) == 1


def test_a_short_training_costs_its_share_in_the_plan(
    lab: Lab, runner: Runner, configured: Callable[[str], Lab]
) -> None:
    short = planned(lab, approved(lab, {"lr": 0.02})).seconds
    whole = planned(configured(""), approved(lab, {"beta2": 0.99})).seconds
    assert short is not None
    assert whole is not None
    assert short < whole


def test_a_null_ends_on_its_rung_and_trains_nothing_whole(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"beta2": 0.99})
    planned(lab, experiment)
    verdict = settled(lab, runner, experiment, world)
    assert (verdict.said, verdict.share, verdict.final) == ("not promising", 0.25, True)
    assert budgets(lab, experiment, "confirm") == set()


def test_what_helps_only_a_short_training_is_never_called_improved(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"beta1": 0.8})
    planned(lab, experiment)
    verdict = settled(lab, runner, experiment, world)
    assert get_hypothesis(lab.store, experiment.id) is not None
    assert verdict.said in ("worse", "no evidence yet")
    assert verdict.effect is not None
    assert verdict.effect > 0.0


def test_the_noise_of_short_runs_is_not_taken_for_that_of_long_ones(lab: Lab, runner: Runner) -> None:
    first, second = approved(lab, {"lr": 0.02}), approved(lab, {"lr": 0.021})
    planned(lab, first)
    settled(lab, runner, first, world)
    hypothesis = get_hypothesis(lab.store, first.id)
    assert hypothesis is not None
    assert hypothesis.noise_sd is None

    planned(lab, second)
    settled(lab, runner, second, world)
    later = get_hypothesis(lab.store, second.id)
    assert later is not None
    assert later.noise_sd is not None
    assert later.noise_sd < 0.006
    second = get_experiment(lab.store, second.id)
    short = noise_here(lab, second, "val_bpb", "screen")
    assert short is not None
    assert short.sd > 0.004

    whole = scored_pairs(lab.store, second, "val_bpb", same_checkpoint=False)
    assert {pair.stage for pair in whole} == {"confirm"}
    assert {pair.experiment_id for pair in whole} == {first.id, second.id}


def test_an_experiment_keeps_the_length_that_it_was_begun_with(
    configured: Callable[[str], Lab], register: Callable[[Lab], Runner]
) -> None:
    lab = configured("")
    runner = register(lab)
    old = approved(lab, {"beta2": 0.99})
    planned(lab, old)
    settled(lab, runner, old, world)

    lab = configured(RUNG)
    plan = planned(lab, old, seeds=3)
    assert "its screening began at the whole budget" in plan.notes
    assert settled(lab, runner, old, world).share == 1.0
    new = approved(lab, {"beta2": 0.98})
    planned(lab, new)
    assert settled(lab, runner, new, world).share == 0.25
    assert budgets(lab, old, "screen") == {WHOLE}
    assert budgets(lab, new, "screen") == {WHOLE // 4}

    lab = configured("")
    assert "its screening began at 1/4 of the budget" in planned(lab, new, seeds=3).notes
    assert settled(lab, runner, new, world).share == 0.25
    assert budgets(lab, new, "screen") == {WHOLE // 4}
    noise = noise_here(lab, old, "val_bpb")
    assert noise is not None
    assert noise.sd < 0.006


@pytest.mark.parametrize(
    ("treatment", "note"),
    [
        ({"quantize": "int8"}, "screened at the whole budget: what is done to trained weights is measured on models"),
        ({"batch_size": 128}, "screened at the whole budget, 1/4 of the budget is too little"),
    ],
)
def test_what_cannot_be_screened_short_says_why(
    lab: Lab, runner: Runner, treatment: dict[str, object], note: str
) -> None:
    experiment = approved(lab, treatment)
    plan = planned(lab, experiment)
    assert any(note in item for item in plan.notes)
    assert get_experiment(lab.store, experiment.id).screen_share == 1.0


def test_equal_flops_are_equal_on_the_rung_too(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"num_experts": 8, "top_k": 4}, equal_flops=True)
    planned(lab, experiment)
    verdict = settled(lab, runner, experiment, world)
    assert verdict.share == 0.25
    assert verdict.treatment_flops == pytest.approx(verdict.baseline_flops, rel=0.1)


def test_a_budget_in_seconds_is_shared_out_as_well(lab: Lab, runner: Runner) -> None:
    base = apply(PRESETS["nano"], {"budget_tokens": None, "budget_seconds": 60.0})
    experiment = approved(lab, {"lr": 0.02}, baseline=base.model_dump())
    assert any("(15 s a run)" in note for note in planned(lab, experiment).notes)
    (first, *_) = pairs(lab.store, experiment.id)
    assert first.treatment is not None
    assert first.treatment.config["budget_seconds"] == 15.0


def test_each_run_is_reproduced_at_its_own_length(
    lab: Lab, runner: Runner, register: Callable[[Lab], Runner], tmp_path: Path
) -> None:
    experiment = approved(lab, {"lr": 0.02})
    planned(lab, experiment)
    settled(lab, runner, experiment, world)
    (tmp_path / "other").mkdir()
    other = Lab(tmp_path / "other")
    reruns = queue_again(lab, other, experiment.id, register(other))
    work_off(other, register(other), world)
    agreement = compare(lab, other, experiment.id, reruns, [])
    assert (agreement.reproduced, agreement.exact) == (True, True)
    copy = get_experiment(other.store, 1)
    assert copy.screen_share == 0.25
    assert budgets(other, copy, "screen") == {WHOLE // 4}
    assert budgets(other, copy, "confirm") == {WHOLE}
    other.close()


def test_only_what_was_trained_on_the_whole_budget_is_taken_apart(lab: Lab, runner: Runner) -> None:
    null, gain = approved(lab, {"beta2": 0.98}), approved(lab, {"lr": 0.02})
    for experiment in (null, gain):
        planned(lab, experiment)
        settled(lab, runner, experiment, world)

    with pytest.raises(RefusedError, match="concluded with 0 trained models of today's moe/ and the whole budget"):
        enqueue(lab, [null.id], ablate=True)

    (plan,) = enqueue(lab, [gain.id], ablate=True).plans
    hypothesis = get_hypothesis(lab.store, gain.id)
    assert hypothesis is not None
    assert plan.seeds == sorted(hypothesis.seeds)


def test_insights_do_not_mix_lengths(lab: Lab, runner: Runner) -> None:
    for value in (0.02, 0.021):
        experiment = approved(lab, {"lr": value})
        planned(lab, experiment)
        settled(lab, runner, experiment, world)

    null = approved(lab, {"lr": 0.011})
    planned(lab, null)
    settled(lab, runner, null, world)
    (insight,) = list_insights(lab.store)
    assert insight.verdict_count == 3
    assert insight.effect == pytest.approx(-0.2, abs=0.01)
