"""The words of a verdict: right on clear cases, silent on noise, and rarely wrong however often one looks."""

from __future__ import annotations

import random

import pytest

from agents.judge import Ruling, Score, weigh


def scores(differences: list[float], *, baseline: float = 3.0, jitter: float = 0.0) -> list[Score]:
    """Pairs with these differences; baselines spread by `jitter`."""
    return [
        Score(seed=seed, baseline=baseline + jitter * seed, treatment=baseline + jitter * seed + difference)
        for seed, difference in enumerate(differences, start=1)
    ]


def test_a_large_steady_effect_is_decided_with_two_pairs() -> None:
    ruling = weigh(scores([-0.300, -0.301]))
    assert ruling.word == "improved"
    assert ruling.low < -0.3005 < ruling.high < 0
    assert ruling.effect == pytest.approx(-0.3005)


@pytest.mark.parametrize(("direction", "word"), [("lower", "worse"), ("higher", "improved")])
def test_the_direction_of_the_metric_decides_which_side_is_better(direction: str, word: str) -> None:
    assert weigh(scores([0.300, 0.301]), direction=direction).word == word  # type: ignore[arg-type]


def test_a_gain_within_the_noise_is_no_evidence() -> None:
    assert weigh(scores([-0.02, 0.01, -0.015])).word == "no evidence yet"


def test_a_null_effect_much_smaller_than_the_noise_floor_is_equivalent() -> None:
    assert weigh(scores([0.0001, -0.0001, 0.0], jitter=0.01)).word == "equivalent"


def test_what_never_differs_is_equivalent() -> None:
    assert weigh(scores([0.0, 0.0])).word == "equivalent"


def test_pairs_of_other_experiments_tell_of_the_noise() -> None:
    alone = weigh(scores([-0.05, -0.057]))
    informed = weigh(scores([-0.05, -0.057]), [scores([0.0, 0.009]), scores([0.1, 0.108]), scores([0.0, -0.009])])
    assert alone.word == "no evidence yet"
    assert informed.word == "improved"
    assert width(informed) < width(alone)


def test_a_treatment_noisier_than_its_class_uses_its_own_noise() -> None:
    calm = [scores([0.0, 0.0001]) for _ in range(20)]
    assert weigh(scores([-0.1, 0.1]), calm).pair_noise == pytest.approx(0.1414, abs=1e-4)


def test_later_looks_spend_less_of_the_error() -> None:
    pairs = scores([-0.05, -0.06, -0.055])
    assert width(weigh(pairs, first_look=2)) > width(weigh(pairs, first_look=3))


def test_fewer_than_two_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        weigh(scores([0.1]))


def test_null_treatments_are_rarely_called_anything_though_we_look_after_every_pair() -> None:
    chance = random.Random(7)
    wrong = 0
    for _ in range(2000):
        differences = [chance.gauss(0.0, 0.01) for _ in range(6)]
        looks = [weigh(scores(differences[:count], jitter=0.0)).word for count in range(2, 7)]
        wrong += any(word in ("improved", "worse") for word in looks)

    assert wrong / 2000 <= 0.05


def width(ruling: Ruling) -> float:
    """Of the interval."""
    return ruling.high - ruling.low
