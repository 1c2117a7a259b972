"""The noise of a class, from pairs that may share baselines: right in size, and no better known than it is."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from agents.class_noise import noise_of
from agents.effects import effects_of
from db.comparisons import ScoredPair
from db.records import Stage


def pair(experiment: int, seed: int, baseline: float, treatment: float, *, stage: Stage = "screen") -> ScoredPair:
    """One of experiment's pairs; in screening all experiments share the baseline's runs."""
    return ScoredPair(
        experiment_id=experiment,
        stage=stage,
        seed=seed,
        baseline_fingerprint="base",
        treatment_fingerprint=f"treatment {experiment}",
        extended=False,
        baseline=baseline,
        treatment=treatment,
    )


def screening(draw: random.Random, experiments: int, seeds: int) -> list[ScoredPair]:
    """Runs of deviation 1 about their config's mean and their seed's; so a pair's difference has sqrt(2)."""
    of_seed = {seed: draw.gauss(0.0, 10.0) for seed in range(seeds)}
    baseline = {seed: effect + draw.gauss(0.0, 1.0) for seed, effect in of_seed.items()}
    return [
        pair(experiment, seed, baseline[seed], 5.0 * experiment + effect + draw.gauss(0.0, 1.0))
        for experiment in range(experiments)
        for seed, effect in of_seed.items()
    ]


def test_shared_baselines_and_seeds_that_are_hard_for_all_do_not_count_as_noise() -> None:
    noise = noise_of(screening(random.Random(0), 60, 3))
    assert noise is not None
    assert noise.sd == pytest.approx(math.sqrt(2.0), rel=0.1)
    assert noise.df == 120.0


def test_the_noise_is_as_well_known_as_its_degrees_of_freedom_say() -> None:
    """Over labs, sd^2 df / 2 is chi-squared on df degrees of freedom: mean df and variance 2 df."""
    draw = random.Random(1)
    found = [noise_of(screening(draw, 5, 3)) for _ in range(400)]
    squares = [noise.sd**2 * 10.0 / 2.0 for noise in found if noise is not None and noise.df == 10.0]
    assert len(squares) > 350  # the others seemed to scatter unlike each other, by chance
    assert fmean(squares) == pytest.approx(10.0, rel=0.1)
    assert fmean((value - 10.0) ** 2 for value in squares) == pytest.approx(20.0, rel=0.35)


def test_a_confirmation_is_not_weighed_against_noise_made_from_itself() -> None:
    calm = [pair(1, seed, 0.0, 0.001 * seed, stage="confirm") for seed in range(5)]
    wild = [pair(2, seed, 0.0, 10.0 * seed, stage="confirm") for seed in range(5)]
    both, without = noise_of([*calm, *wild]), noise_of([*calm, *wild], apart_from=2)
    assert both is not None
    assert without is not None
    assert without.sd == pytest.approx(0.00158, rel=0.01)
    assert both.sd > 1.0
    assert noise_of(wild, apart_from=2) is None


def test_an_experiments_effect_is_that_of_all_its_pairs() -> None:
    found = [pair(1, 1, 0.0, 3.0), pair(1, 2, 1.0, 2.0, stage="confirm"), pair(2, 1, 0.0, -1.0)]
    assert effects_of(found) == {1: [3.0, 1.0], 2: [-1.0]}
