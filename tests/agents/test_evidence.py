"""Evidence from pairs: it is fair while nothing is there, grows when something is, and no scatter or loss fakes it."""

from __future__ import annotations

import math
import random

import pytest
from scipy.integrate import quad
from scipy.stats import t as student

from agents.evidence import SPREADS, Better, Moments, bounded, equivalence, evidence, interval, log_evidence
from agents.noise import Noise, pool

NOISE = Noise(sd=1.0, df=12.0)


def predictive(value: float, noise: Noise, before: list[float]) -> float:
    """The density of the next difference when nothing is there, given the differences before it."""
    density = total = 0.0
    for spread, prior in SPREADS:
        squares = noise.df * (spread * noise.sd) ** 2
        weight = prior
        for index, seen in enumerate(before):
            df = noise.df + index
            weight *= float(student.pdf(seen, df, scale=math.sqrt(squares / df)))
            squares += seen**2

        df = noise.df + len(before)
        density += weight * float(student.pdf(value, df, scale=math.sqrt(squares / df)))
        total += weight

    return density / total


@pytest.mark.parametrize("better", ["lower", "higher", None])
@pytest.mark.parametrize("before", [[], [-1.3], [0.4, -2.0, -1.1]])
def test_nothing_makes_no_evidence_on_average_whatever_came_before(better: Better | None, before: list[float]) -> None:
    def weighed(value: float) -> float:
        log = log_evidence(Moments.of([*before, value]), NOISE, better)
        return math.exp(log) * predictive(value, NOISE, before)

    average, _ = quad(weighed, -math.inf, math.inf, epsabs=1e-10, limit=400)
    assert average == pytest.approx(math.exp(log_evidence(Moments.of(before), NOISE, better)), rel=1e-5)


def test_a_null_that_is_worse_than_nothing_makes_no_more_evidence() -> None:
    """Where evidence speaks for a gain at all, shifting every difference to the bad side lowers it."""
    for df in (0.0, 2.0, 20.0, 1000.0):
        for n in (1, 2, 5, 20):
            for squares in (1e-9, 0.3 * n, 3.0 * n, 30.0 * n):
                noise, least = Noise(sd=1.0, df=df), math.inf
                for mean in [-100.0 * 0.9**k for k in range(150)] + [0.001 * 1.1**k for k in range(150)]:
                    log = log_evidence(Moments(n, mean, squares), noise, "lower")
                    assert log <= max(least, 0.0) + 1e-9
                    least = min(least, log)


def test_a_steady_gain_is_soon_evident_and_the_other_direction_is_not() -> None:
    gains = [-2.1, -1.8, -2.2, -1.9, -2.0]
    assert evidence(gains, NOISE, better="lower") > 100
    assert evidence(gains, NOISE, better="higher") < 0.2
    assert evidence([-gain for gain in gains], NOISE, better="higher") == pytest.approx(
        evidence(gains, NOISE, better="lower")
    )
    assert evidence([], NOISE, better="lower") == 1.0


def test_evidence_has_no_unit() -> None:
    small = evidence([-0.002, -0.0015], Noise(sd=0.001, df=6.0), better="lower")
    assert small == pytest.approx(evidence([-2.0, -1.5], Noise(sd=1.0, df=6.0), better="lower"))


def test_badly_known_noise_weakens_evidence() -> None:
    gains = [-3.0, -3.0, -3.0]
    by_df = [evidence(gains, Noise(sd=1.0, df=df), better="lower") for df in (2.0, 6.0, 20.0, 1000.0)]
    assert by_df == sorted(by_df)


def test_without_noise_the_pairs_tell_of_their_own() -> None:
    assert evidence([-1.0], None, better="lower") < 2.0
    assert evidence([-1.0, -1.1, -0.9, -1.05, -0.95, -1.0], None, better="lower") > 20
    assert interval([-1.0, -1.1], None) == (-math.inf, math.inf)


def test_what_never_differs_says_nothing_and_a_difference_in_what_never_scatters_all() -> None:
    assert evidence([0.0, 0.0], Noise(sd=0.0, df=3.0), better="lower") == 1.0
    assert evidence([-0.1, -0.1], Noise(sd=0.0, df=3.0), better="lower") > 100


@pytest.mark.parametrize("spread", [1.0, 2.0, 3.0])
def test_peeking_at_nothing_rarely_finds_a_gain_also_where_it_scatters_more(spread: float) -> None:
    draw = random.Random(0)
    found, labs = 0, 400
    for _ in range(labs):
        variance = sum(draw.gauss(0.0, 1.0) ** 2 for _ in range(8)) / 8
        noise = Noise(sd=math.sqrt(variance), df=8.0)
        differences: list[float] = []
        while len(differences) < 12:
            differences.append(draw.gauss(0.0, spread))
            if evidence(differences, noise, better="lower") >= 20:
                found += 1
                break

    assert found <= 0.05 * labs


def test_the_interval_holds_at_every_look() -> None:
    draw = random.Random(1)
    missed, labs = 0, 200
    for _ in range(labs):
        variance = sum(draw.gauss(0.0, 1.0) ** 2 for _ in range(6)) / 6
        noise = Noise(sd=math.sqrt(variance), df=6.0)
        differences = [draw.gauss(-1.0, 1.0) for _ in range(10)]
        intervals = [interval(differences[:look], noise) for look in range(1, 11)]
        missed += not all(low <= -1.0 <= high for low, high in intervals)

    assert missed <= 0.05 * labs
    assert intervals[-1][1] - intervals[-1][0] < intervals[0][1] - intervals[0][0]


def test_the_interval_is_where_two_sided_evidence_reaches_its_level() -> None:
    low, high = interval([-1.2, -0.9, -1.0], NOISE, alpha=0.1)
    for end in (low, high):
        moved = [value - end for value in (-1.2, -0.9, -1.0)]
        assert math.exp(log_evidence(Moments.of(moved), NOISE, None)) == pytest.approx(10.0, rel=1e-4)


def test_equivalence_needs_many_pairs_near_zero() -> None:
    near = [0.1, -0.1, 0.2, -0.2] * 10
    assert equivalence(near, NOISE, margin=1.0) > 20
    assert equivalence(near[:4], NOISE, margin=1.0) < 20
    assert equivalence([value - 1.0 for value in near], NOISE, margin=1.0) < 1.0


def test_a_lost_pair_counts_at_its_worst_and_not_as_if_it_had_not_been() -> None:
    gains: list[float | None] = [-2.0, -2.0, -2.0, -2.0, None]
    assert bounded(gains, worst=6.0) == [-2.0, -2.0, -2.0, -2.0, 6.0]
    kept = evidence([-2.0] * 4, NOISE, better="lower")
    for would_have_been in (-8.0, -2.0, 0.0, 3.0, 6.0):
        true = evidence([-2.0] * 4 + [would_have_been], NOISE, better="lower")
        assert evidence(bounded(gains, worst=6.0), NOISE, better="lower") <= true

    assert evidence(bounded(gains, worst=6.0), NOISE, better="lower") < 0.05 * kept


def test_the_noise_is_pooled_within_experiments() -> None:
    noise = pool([[1.0, 3.0], [11.0, 13.0], [-5.0, -3.0, -1.0], [7.0]])
    assert noise is not None
    assert noise.sd == pytest.approx(math.sqrt(12.0 / 4.0))
    assert noise.df == pytest.approx(4.0)
    assert pool([]) is None
    assert pool([[1.0], [2.0]]) is None
    assert pool([[0.0, 0.0]]) == Noise(sd=0.0, df=1.0)


def test_experiments_that_scatter_unlike_each_other_leave_few_degrees_of_freedom() -> None:
    draw = random.Random(2)
    alike = pool([[draw.gauss(0.0, 1.0) for _ in range(4)] for _ in range(40)])
    unlike = pool([[draw.gauss(0.0, spread) for _ in range(4)] for spread in (0.3, 1.0, 3.0, 9.0) * 10])
    assert alike is not None
    assert unlike is not None
    assert 20 < alike.df <= 120
    assert alike.sd == pytest.approx(1.0, rel=0.15)
    assert unlike.df < 6
