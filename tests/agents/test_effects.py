"""The true effect to expect, as verdicts show it: nearer to none than the observed one, and less so with every pair."""

from __future__ import annotations

from agents import mind
from agents.planner import enqueue
from db.experiments import get_experiment
from db.lab import Lab
from db.records import Experiment, Runner, Verdict
from moe.config import Config
from tests.agents.test_research import approved, luck, settled, verdict_of, work_off

NOTHING = [{"beta1": 0.8}, {"beta1": 0.85}, {"weight_decay": 0.2}, {"weight_decay": 0.05}, {"grad_clip": 2.0}]


def small_gain(config: Config, seed: int) -> float:
    """lr 0.02 gains 0.03, which in screening is one and a half deviations of a pair; nothing else acts."""
    chance = luck(seed, config.lr, config.beta1, config.weight_decay, config.grad_clip)
    scatter = 0.014 if seed < 1_000_000 else 0.002  # the lab draws other seeds each time, and they shall change nothing
    return 3.0 - (0.03 if config.lr == 0.02 else 0.0) + scatter * chance


def course(lab: Lab, runner: Runner, experiment: Experiment) -> list[Verdict]:
    """The verdict after every look, until it is settled."""
    seen = []
    while get_experiment(lab.store, experiment.id).status in ("queued", "running"):
        work_off(lab, runner, small_gain)
        mind.work(lab)
        seen.append(verdict_of(lab, experiment))

    return seen


def test_less_is_expected_than_was_observed_and_nearly_all_of_it_after_many_pairs(lab: Lab, runner: Runner) -> None:
    others = [approved(lab, treatment) for treatment in NOTHING]
    enqueue(lab, [experiment.id for experiment in others])
    for experiment in others:
        verdict = settled(lab, runner, experiment, small_gain)
        assert verdict.effect is not None
        assert verdict.expected is not None
        assert abs(verdict.expected) < 0.5 * abs(verdict.effect)

    gain = approved(lab, {"lr": 0.02})
    enqueue(lab, [gain.id], confirm=True)
    looks = course(lab, runner, gain)
    kept = [(look.expected or 0.0) / (look.effect or 1.0) for look in looks]
    assert looks[-1].said == "improved"
    assert 0.0 < kept[0] < 0.5
    assert kept[0] < kept[1] < kept[-1]
    assert 0.9 < kept[-1] < 1.1
