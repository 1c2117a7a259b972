"""How many pairs a claim will take, and whether going on can still lead to one. Pure functions, for planning only:
no verdict's validity rests on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agents.discoveries import level
from agents.evidence import Better, Moments, log_evidence
from agents.noise import Noise
from agents.student import quantile

FUTILE = 0.15
"""A claim less probable than this is not worth waiting for: of .05 to .5 a good compromise between GPU time for a true
claim and true claims (benchmarks/race.py)."""

HOPED = 0.5
"""The share of the other open hypotheses that are counted on to be claimed, which lowers what one needs. With 0 a sixth
of the claims of one deviation is given up (benchmarks/race.py)."""

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

    low, high = 1, 2  # one pair claims nothing (agents/weighing.py)
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
    """Whether a claim at `level` by the last of `max_pairs` is so improbable, after these differences, that it is over.

    The probability is predicted with every effect equally likely beforehand; the evidence that can just be hoped for is
    compared with what a claim needs. Stopping for this costs power, never validity. `level` should count on the claims
    that open hypotheses may still bring (agents.confirmation.hoped_level).
    """
    n, mean, squares = Moments.of(differences)
    sd, df = (noise.sd, noise.df) if noise is not None else (0.0, 0.0)
    left = df + n - 1.0
    if n == 0 or left <= 0.0:
        return False

    variance = (df * sd**2 + squares) / left
    ahead = max(max_pairs - n, 0)
    drift = quantile(left, 1.0 - FUTILE) * math.sqrt(variance * (1.0 / n - 1.0 / (n + ahead)))
    hoped = mean - drift if better == "lower" else mean + drift
    return log_evidence(Moments(n + ahead, hoped, squares + ahead * variance), noise, better) < -math.log(level)
