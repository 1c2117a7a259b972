"""Screening pair by pair: one where it tells enough, a second where it does not, and as many as somebody asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agents import mind
from agents.class_noise import noise_here
from agents.confirmation import hoped_level, needed
from agents.noise import Noise
from agents.planner import Plan, enqueue
from agents.screening import KNOWN, outlook
from db.errors import RefusedError
from db.hypotheses import get_hypothesis
from db.lab import Lab
from db.records import Experiment, Runner
from moe.config import Config
from tests.agents.test_research import approved, luck, settled, verdict_of, work_off

HARMFUL = [{"beta2": 0.9 + 0.005 * step} for step in range(8)]

GAINS = {0.001: (-0.2, -0.2), 0.012: (0.014, 0.03), 0.015: (0.014, 0.0), 0.02: (0.2, 0.2)}
"""Of learning rates, in screening on seeds 1 and 2."""


def world(config: Config, seed: int) -> float:
    """Pairs of the harmful deviate by about 0.01, and what GAINS says is gained exactly; after screening 0.2."""
    if config.beta2 in [treatment["beta2"] for treatment in HARMFUL]:
        return 3.1 + 0.01 * luck(seed, config.beta2)

    return 3.0 - (GAINS[config.lr][seed - 1] if seed < 3 else 0.2) if config.lr in GAINS else 3.0


@pytest.fixture
def knowing(lab: Lab, runner: Runner) -> Lab:
    """A lab that knows its noise from eight degrees of freedom, of eight experiments."""
    experiments = [approved(lab, treatment) for treatment in HARMFUL]
    plans = enqueue(lab, [experiment.id for experiment in experiments]).plans
    assert {tuple(plan.seeds) for plan in plans} == {(1, 2)}
    work_off(lab, runner, world)
    mind.work(lab)
    return lab


def planned(lab: Lab, experiment: Experiment, *, seeds: int | None = None) -> Plan:
    """The plan of an experiment that goes into the queue."""
    (plan,) = enqueue(lab, [experiment.id], seeds=seeds).plans
    return plan


def test_the_rule() -> None:
    known, unknown = Noise(sd=0.01, df=KNOWN), Noise(sd=0.01, df=KNOWN - 1.0)
    assert [outlook(gain, 1, known) for gain in (-0.001, 0.001, 0.019, 0.02)] == [
        "not promising",
        None,
        None,
        "promising",
    ]
    assert [outlook(gain, 1, unknown) for gain in (-0.001, 0.05)] == ["not promising", None]
    assert [outlook(gain, 2, known) for gain in (0.007, 0.0072)] == ["not promising", "promising"]


def test_one_pair_is_enough_for_what_harms_and_for_what_gains_much(knowing: Lab, runner: Runner) -> None:
    harm, gain = approved(knowing, {"lr": 0.001}), approved(knowing, {"lr": 0.02})
    plan = planned(knowing, harm)
    assert (plan.seeds, plan.runs_new, plan.runs_shared) == (
        [1],
        2,
        1,
    )  # a probe and a treatment; the baseline is there
    assert any("a second one" in note and "only where the first leaves" in note for note in plan.notes)
    planned(knowing, gain)
    work_off(knowing, runner, world)
    mind.work(knowing)
    verdict = verdict_of(knowing, harm)
    assert (verdict.said, verdict.final, verdict.pairs) == ("not promising", True, 1)
    assert "over 1 screening pair;" in verdict.sentence or verdict.sentence.endswith("over 1 screening pair.")
    verdict = verdict_of(knowing, gain)
    assert (verdict.said, verdict.final, verdict.pairs) == ("promising", False, 1)
    hypothesis = get_hypothesis(knowing.store, gain.id)
    assert hypothesis is not None
    assert len(hypothesis.seeds) == 1
    verdict = settled(knowing, runner, gain, world)
    assert (verdict.said, verdict.pairs) == ("improved", 2)  # no claim rests on one new pair, however large the gain


@pytest.mark.parametrize(("lr", "word"), [(0.012, "promising"), (0.015, "not promising")])
def test_a_second_pair_follows_where_the_first_leaves_the_question_open(
    knowing: Lab, runner: Runner, lr: float, word: str
) -> None:
    experiment = approved(knowing, {"lr": lr})
    planned(knowing, experiment)
    work_off(knowing, runner, world)
    mind.work(knowing)
    verdict = verdict_of(knowing, experiment)
    assert (verdict.said, verdict.final, verdict.pairs) == ("no evidence yet", False, 1)
    assert verdict.reason == "it is better, but not by so much that one pair tells: a second one follows"
    before = noise_here(knowing, experiment, "val_bpb", "screen")
    work_off(knowing, runner, world)
    mind.work(knowing)
    verdict = verdict_of(knowing, experiment)
    assert (verdict.said, verdict.pairs, verdict.seeds) == (word, 2, [1, 2])
    assert noise_here(knowing, experiment, "val_bpb", "screen") == before  # it was picked for its first pair


def test_as_many_pairs_as_somebody_asks_for(knowing: Lab, runner: Runner) -> None:
    experiment = approved(knowing, {"lr": 0.001})
    assert planned(knowing, experiment, seeds=3).seeds == [1, 2, 3]
    assert settled(knowing, runner, experiment, world).pairs == 3


def test_one_pair_does_not_do_while_the_noise_is_unknown(lab: Lab, runner: Runner) -> None:
    with pytest.raises(RefusedError, match=r"seeds=1 is outside 2 to 4 .*; one will do once the noise is known better"):
        planned(lab, approved(lab, {"lr": 0.02}), seeds=1)


def test_a_lab_may_insist_on_two_pairs(configured: Callable[[str], Lab], register: Callable[[Lab], Runner]) -> None:
    lab = configured("min_seeds = 2\n")
    runner = register(lab)
    enqueue(lab, [approved(lab, treatment).id for treatment in HARMFUL])
    work_off(lab, runner, world)
    mind.work(lab)
    assert planned(lab, approved(lab, {"lr": 0.001})).seeds == [1, 2]


def test_who_asks_for_a_confirmation_waits_for_no_second_screening_pair(knowing: Lab, runner: Runner) -> None:
    experiment = approved(knowing, {"lr": 0.015})
    (plan,) = enqueue(knowing, [experiment.id], confirm=True).plans
    assert not any("a second one" in note for note in plan.notes)
    work_off(knowing, runner, world)
    mind.work(knowing)
    assert verdict_of(knowing, experiment).pairs == 1
    assert get_hypothesis(knowing.store, experiment.id) is not None


def test_plans_count_on_half_of_what_is_open(knowing: Lab, runner: Runner) -> None:
    experiments = [approved(knowing, {"lr": lr}) for lr in (0.001, 0.015, 0.02)]
    enqueue(knowing, [experiment.id for experiment in experiments], confirm=True)
    work_off(knowing, runner, world)
    mind.work(knowing)
    hypothesis = get_hypothesis(knowing.store, experiments[0].id)
    assert hypothesis is not None
    assert hoped_level(knowing, hypothesis) * needed(knowing, hypothesis) == pytest.approx(2.0)
