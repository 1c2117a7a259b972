"""How many pairs a claim will take, and whether going on can still lead to one. Pure functions, for planning only:
no verdict's validity rests on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtr

from agents.discoveries import level
from agents.evidence import Better, Moments, log_evidence, smallest_mean
from agents.noise import Noise

FUTILE = 0.05
"""A claim less probable than this is not worth waiting for."""

MOST_PAIRS = 10_000


def pairs_needed(effect: float, *, hypotheses: int, df: float) -> int:
    """Pairs until a claim, in the median, at the end of a campaign in which nothing else was claimed.

    Args:
        effect: the true one, in deviations of a pair (Noise.sd); its sign does not matter.
        hypotheses: how many the campaign has registered, with this one.
        df: from which the noise is known (Noise.df).

    Taken from the course that the evidence takes when mean and scatter are what they are expected to be; within one
    pair in ten of the simulated median (benchmarks/verdicts.py). MOST_PAIRS is the answer where it takes that many.
    """
    noise = Noise(sd=1.0, df=df)
    target = -math.log(level(hypotheses, 0))

    def enough(n: int) -> bool:
        return log_evidence(Moments(n, -abs(effect), n - 1.0), noise, "lower") >= target

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return MOST_PAIRS

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)

    return high


def is_futile(
    differences: Sequence[float], noise: Noise | None, *, better: Better, level: float, max_pairs: int
) -> bool:
    """Whether a claim at `level` within `max_pairs` is so improbable, given the differences so far, that it is over.

    The probability is predicted with every effect equally likely beforehand. Stopping for this costs power, never
    validity.
    """
    n, mean, squares = Moments.of(differences)
    if n == 0:
        return False

    sign = 1.0 if better == "lower" else -1.0
    sd, df = (noise.sd, noise.df) if noise is not None else (0.0, 0.0)
    left = df + n - 1.0
    if left <= 0.0:
        return False

    variance = (df * sd**2 + squares) / left
    target = -math.log(level)
    best = 0.0
    for m in _looks(n, max_pairs):
        needs = smallest_mean(m, squares + (m - n) * variance, noise, better, target)
        ahead = math.sqrt(variance * (1.0 / n - 1.0 / m))
        if math.isinf(needs):
            continue

        if ahead == 0.0:
            best = max(best, float(-sign * mean >= needs))
        else:
            best = max(best, float(stdtr(left, (-sign * mean - needs) / ahead)))

    return best < FUTILE


def _looks(n: int, max_pairs: int) -> list[int]:
    """About eight moments up to the last pair: a claim at one of them is as good as one at any."""
    step = max(1, (max_pairs - n) // 8)
    return sorted({*range(n + 1, max_pairs + 1, step), max_pairs} - set(range(n + 1)))
