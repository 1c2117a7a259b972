"""What is said beforehand of pairs and effects: planned lengths are met, hopeless ones end, claimed effects shrink."""

from __future__ import annotations

import math
import random
from statistics import fmean, median

import pytest

from agents.discoveries import level
from agents.evidence import evidence
from agents.noise import Noise
from agents.prospects import is_futile, pairs_needed
from agents.shrinkage import shrunk

NOISE = Noise(sd=1.0, df=30.0)


@pytest.mark.parametrize(("effect", "hypotheses"), [(4.0, 1), (2.0, 10), (1.0, 1)])
def test_the_planned_number_of_pairs_is_about_the_median(effect: float, hypotheses: int) -> None:
    draw = random.Random(0)
    lengths = []
    for _ in range(61):
        variance = sum(draw.gauss(0.0, 1.0) ** 2 for _ in range(20)) / 20
        noise = Noise(sd=math.sqrt(variance), df=20.0)
        differences: list[float] = []
        while evidence(differences, noise, better="lower") < 1.0 / level(hypotheses, 0):
            differences.append(draw.gauss(-effect, 1.0))

        lengths.append(len(differences))

    planned = pairs_needed(effect, hypotheses=hypotheses, df=20.0)
    assert abs(planned - median(lengths)) <= max(1.0, 0.15 * planned)


def test_more_hypotheses_and_smaller_effects_need_more_pairs() -> None:
    by_hypotheses = [pairs_needed(1.0, hypotheses=h, df=20.0) for h in (1, 10, 50)]
    by_effect = [pairs_needed(effect, hypotheses=10, df=20.0) for effect in (4.0, 2.0, 1.0, 0.5)]
    assert by_hypotheses == sorted(by_hypotheses)
    assert by_effect == sorted(by_effect)
    assert pairs_needed(-2.0, hypotheses=1, df=20.0) == pairs_needed(2.0, hypotheses=1, df=20.0)
    assert pairs_needed(0.0, hypotheses=1, df=20.0) == 10_000


def test_going_on_is_pointless_where_a_claim_can_hardly_come_any_more() -> None:
    assert is_futile([0.8, 0.5, 1.1], NOISE, better="lower", level=0.005, max_pairs=8)
    assert not is_futile([0.8, 0.5, 1.1], NOISE, better="higher", level=0.005, max_pairs=30)
    assert not is_futile([-2.0, -1.5], NOISE, better="lower", level=0.005, max_pairs=12)
    assert is_futile([-0.2], NOISE, better="lower", level=0.005, max_pairs=2)
    assert not is_futile([], NOISE, better="lower", level=0.005, max_pairs=8)
    assert not is_futile([1.0], None, better="lower", level=0.005, max_pairs=8)


def test_an_observed_effect_shrinks_less_the_better_it_is_known() -> None:
    by_pairs = [shrunk(-1.0, n, NOISE) for n in (1, 4, 16, 64)]
    assert by_pairs == sorted(by_pairs, reverse=True)
    assert -1.0 <= by_pairs[-1] < -0.95
    assert -0.7 < by_pairs[0] < 0.0
    assert shrunk(0.5, 4, Noise(sd=0.0, df=1.0)) == 0.5
    assert shrunk(-90.0, 4, NOISE) == -90.0
    assert shrunk(-0.001, 4, Noise(sd=0.001, df=30.0)) == pytest.approx(0.001 * shrunk(-1.0, 4, NOISE))


def test_a_lab_in_which_little_works_expects_less_of_a_gain() -> None:
    nothing = [(0.1, 4), (-0.2, 4), (0.3, 4), (-0.1, 4), (0.0, 4)] * 4
    much = [(-1.1, 4), (-0.9, 4), (-1.3, 4), (-1.0, 4), (0.1, 4)] * 4
    assert shrunk(-1.0, 4, NOISE, nothing) > shrunk(-1.0, 4, NOISE) > shrunk(-1.0, 4, NOISE, much) > -1.1


def test_what_was_picked_for_being_large_is_expected_to_be_smaller_and_is_right_on_average() -> None:
    draw = random.Random(4)
    errors, naive = [], []
    for _ in range(2):
        true = [draw.choice([0.0, 0.0, 0.0, -1.0]) for _ in range(60)]
        seen = [(effect + draw.gauss(0.0, 0.5), 4) for effect in true]
        for index, (mean, n) in enumerate(seen):
            if mean < -0.9:
                errors.append(shrunk(mean, n, NOISE, seen[:index] + seen[index + 1 :]) - true[index])
                naive.append(mean - true[index])

    assert abs(fmean(errors)) < 0.15
    assert fmean(naive) < -0.2
