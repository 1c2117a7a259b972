"""Claims of a campaign: their false share is bounded over all that was registered, and a claim stands for good."""

from __future__ import annotations

import math
import random

import pytest

from agents.discoveries import ALPHA, discoveries, level, share


def test_shares_sum_to_one_over_all_hypotheses_there_may_ever_be() -> None:
    first = math.fsum(share(t) for t in range(1, 5001))
    tail = (5000.5 + 3.0) ** -0.6 / 0.6 * share(1) * 4.0**1.6
    assert first + tail == pytest.approx(1.0, abs=1e-6)
    assert all(share(t) > share(t + 1) for t in range(1, 200))
    with pytest.raises(ValueError, match="positions count from 1"):
        share(0)


def test_a_claim_needs_one_over_its_level() -> None:
    needed = 1.0 / level(1, 0)
    assert discoveries([needed * 1.001]) == [True]
    assert discoveries([needed * 0.999]) == [False]
    assert level(3, 4) == pytest.approx(5 * level(3, 0))
    assert discoveries([]) == []
    assert discoveries([0.0, 1.0]) == [False, False]


def test_claims_help_those_that_came_before_them() -> None:
    weak = 0.6 / level(1, 0)
    assert discoveries([weak]) == [False]
    assert discoveries([weak, 1e6]) == [True, True]


def test_a_claim_is_never_withdrawn() -> None:
    draw = random.Random(0)
    for _ in range(50):
        e_values: list[float] = []
        claimed: list[bool] = []
        for _ in range(30):
            for index, done in enumerate(claimed):
                if not done:  # what is claimed keeps its e-value; the others go on
                    e_values[index] *= math.exp(draw.gauss(-0.1, 1.0))

            e_values.append(math.exp(draw.gauss(2.0, 3.0)))
            now = discoveries(e_values)
            assert all(now[index] for index, done in enumerate(claimed) if done)
            claimed = now


@pytest.mark.parametrize("dependent", [False, True])
def test_campaigns_of_nothing_rarely_claim_anything(dependent: bool) -> None:
    """e-values that are 1 on average, each by itself or all of them one and the same."""
    draw = random.Random(3)
    campaigns, found = 2000, 0
    for _ in range(campaigns):
        one = 1.0 / (1.0 - draw.random())
        e_values = [0.1 * (one if dependent else 1.0 / (1.0 - draw.random())) for _ in range(20)]
        found += any(discoveries(e_values))

    assert found <= ALPHA * campaigns
