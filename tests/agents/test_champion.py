"""How confirmed gains stack: a lineage, a champion, and the questions whether two gains add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agents.champion import crown
from agents.planner import enqueue
from agents.preflight import base_of
from agents.reviewer import review
from db.champions import list_champions
from db.experiments import get_experiment, list_experiments, move_experiment
from db.lab import Lab
from db.records import Experiment, Runner
from moe.config import Config
from server.tools.status import status
from tests.agents.test_research import approved, luck, settled


def world(interaction: float) -> Callable[[Config, int], float]:
    """Two gains of .2 and .1 that together are `interaction` worse than their sum."""

    def score(config: Config, seed: int) -> float:
        fast, short = config.lr > 0.015, config.beta1 < 0.85
        effect = -0.2 * fast - 0.1 * short + interaction * (fast and short)
        return 3.0 + 0.01 * luck(seed) + effect + 0.003 * luck(seed, config.lr, config.beta1)

    return score


def confirmed(lab: Lab, runner: Runner, experiment: Experiment, interaction: float = 0.0) -> Experiment:
    """The experiment after its gain was claimed."""
    enqueue(lab, [experiment.id])
    assert settled(lab, runner, experiment, world(interaction)).said == "improved"
    return get_experiment(lab.store, experiment.id)


def test_a_confirmed_gain_becomes_the_baseline_of_new_suggestions(
    configured: Callable[[str], Lab], register: Callable[[Lab], Runner]
) -> None:
    lab = configured('preset = "nano"\n')
    runner = register(lab)
    assert base_of(lab).config.lr == 0.01
    won = confirmed(lab, runner, approved(lab, {"lr": 0.02}))
    root, champion = list_champions(lab.store)
    assert (root.parent_id, root.experiment_id, root.gain) == (None, None, 0.0)
    assert (champion.parent_id, champion.experiment_id) == (root.id, won.id)
    assert champion.gain == pytest.approx(0.2, abs=0.02)
    assert base_of(lab).config.lr == 0.02
    seen = status(lab).overview
    assert seen is not None
    assert seen.champion is not None
    assert (seen.champion.changes, seen.champion.experiment_ids) == ({"lr": 0.02}, [won.id])
    assert base_of(configured('preset = "nano"\nbaseline_from = "preset"\n')).config.lr == 0.01


@pytest.mark.parametrize(
    ("interaction", "said", "words"),
    [(0.0, "improved", "no sign of an interaction, alone (experiment 2)"), (0.3, "worse", "the two interact, alone")],
)
def test_a_second_gain_counts_beside_the_first_only_once_they_were_tried_together(
    lab: Lab, runner: Runner, interaction: float, said: str, words: str
) -> None:
    first = confirmed(lab, runner, approved(lab, {"lr": 0.02}))
    second = confirmed(lab, runner, approved(lab, {"beta1": 0.8}))
    [question] = [item for item in list_experiments(lab.store) if item.combines_id]
    assert (question.status, question.combines_id, question.treatment) == ("suggested", second.id, {"beta1": 0.8})
    assert question.baseline["lr"] == 0.02
    assert str(first.id) in (question.source or "")
    assert crown(lab) == []  # it is asked once
    assert review(lab, [question.id]).reviews[0].decision == "approve"
    move_experiment(lab.store, question.id, "approved", allowed=["approved"])
    enqueue(lab, [question.id], confirm=True)
    verdict = settled(lab, runner, question, world(interaction))
    assert verdict.said == said
    assert words in verdict.sentence
    tip = max(list_champions(lab.store), key=lambda item: item.gain)
    assert tip.experiment_id == (question.id if said == "improved" else first.id)


def test_the_same_gain_twice_is_no_combination(lab: Lab, runner: Runner) -> None:
    confirmed(lab, runner, approved(lab, {"lr": 0.02}))
    confirmed(lab, runner, approved(lab, {"lr": 0.02}))
    assert [item for item in list_experiments(lab.store) if item.combines_id] == []


def test_a_lab_may_give_both_sides_equal_time(configured: Callable[[str], Lab]) -> None:
    config = base_of(configured('preset = "nano"\n[baseline]\nbudget_seconds = 2.0\n')).config
    assert (config.budget_tokens, config.budget_seconds) == (None, 2.0)
