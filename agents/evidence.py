"""What paired differences say of a treatment, however often one looks: e-values and intervals. Pure functions.

A difference is treatment - baseline in one fresh pair; n of them are about normal, with mean mu and the deviation of
the class, of which earlier comparisons tell (`agents.noise`). An e-value is the evidence against a null hypothesis: it
is 1 on average, or less, while the hypothesis is true, whenever one stops to look, so it exceeds 1/a with probability
at most a. docs/evidence.md has the derivation, the proofs and the simulations.

    evidence([-0.05, -0.04], noise, better="lower")    # against "the treatment is no better"; 20 would be 1 in 20
    interval([-0.05, -0.04], noise)                    # holds at 95 % over all looks together

`noise` must be fixed before the first of the pairs is looked at, and must not be made from them.

The e-value is the marginal likelihood of the differences under effects of many sizes over that under none, given the
noise measured before: the t-test of Lai (1976) in the form of Pérez-Ortiz, Lardy, de Heide and Grünwald (2022) and
Wang and Ramdas (2025), into which the noise enters like pairs seen earlier, with its degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from agents.noise import Noise
from agents.student import probability

Better = Literal["lower", "higher"]

SIZES = (0.5, 1.5, 4.0)
"""Scales of the effects looked for, in deviations of a pair; the evidence is the mean over them."""

SPREADS = ((1.0, 0.73), (2.0, 0.12), (4.0, 0.15))
"""How much wider than its class a treatment may scatter, and how probable that is.

Chosen so that one which does nothing but scatters 1.5, 2 or 3 times as widely is called improved no more often than it
should be (benchmarks/verdicts.py); if every treatment had to be like its class, it would be 25 to 60 times too often.
"""


class Moments(NamedTuple):
    """What counts of n differences: their mean, and the sum of squares about it."""

    n: int
    mean: float
    squares: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Moments:
        n = len(differences)
        mean = math.fsum(differences) / n if n else 0.0
        return cls(n, mean, math.fsum((value - mean) ** 2 for value in differences))


def evidence(differences: Sequence[float], noise: Noise | None, *, better: Better) -> float:
    """The e-value against "the treatment is no better than the baseline"; 1.0 without differences.

    With `better` turned round it is the one against "no worse". For "equivalent within a margin", see `equivalence`.
    """
    return math.exp(min(log_evidence(Moments.of(differences), noise, better), 700.0))


def equivalence(differences: Sequence[float], noise: Noise | None, *, margin: float) -> float:
    """The e-value against "the effect is `margin` or more, in either direction": the lesser of two one-sided ones."""
    n, mean, squares = Moments.of(differences)
    below = log_evidence(Moments(n, mean - margin, squares), noise, "lower")
    above = log_evidence(Moments(n, mean + margin, squares), noise, "higher")
    return math.exp(min(below, above, 700.0))


def interval(differences: Sequence[float], noise: Noise | None, *, alpha: float = 0.05) -> tuple[float, float]:
    """Effects that the differences do not speak against: contains the true one at all looks together with 1 - alpha.

    It may be infinite while there are few differences and little is known of the noise.
    """
    n, mean, squares = Moments.of(differences)
    half = _half_width(n, squares, noise, -math.log(alpha))
    return mean - half, mean + half


def bounded(differences: Sequence[float | None], *, worst: float) -> list[float]:
    """The differences, each one that was lost (pruned, diverged, timed out: None) counted as `worst`.

    `worst` is the harmful end of what the difference could have been, whatever was lost: then the evidence for
    "better" is at most what it would have been with the pair, and leaving runs out makes no gain.
    """
    return [worst if value is None else value for value in differences]


def log_evidence(moments: Moments, noise: Noise | None, better: Better | None) -> float:
    """The logarithm of the e-value against no effect: a one-sided one, or for None that against mean 0 exactly."""
    n, mean, squares = moments
    sd, df = _parts(noise)
    known = df * sd**2
    if n == 0 or known + squares + mean**2 == 0.0:
        return 0.0

    direction = 1.0 if better == "lower" else -1.0
    total_df = df + n
    nulls, alternatives = [], []
    for spread, prior in SPREADS:
        scatter = known * spread**2 + squares
        around_zero = scatter + n * mean**2
        null = math.log(prior) + df * math.log(spread) - 0.5 * total_df * math.log(around_zero)
        nulls.append(null)
        for size in SIZES:
            gain = 1.0 + n * size**2
            left = scatter + n * mean**2 / gain
            if left == 0.0:
                return math.inf

            log_ratio = 0.5 * (total_df * math.log(around_zero / left) - math.log(gain))
            if better is not None:
                t = -direction * n * mean * size * math.sqrt(total_df / (gain * left))
                log_ratio += math.log(2.0) + _log_student(total_df, t)

            alternatives.append(null + log_ratio - math.log(len(SIZES)))

    return log_sum(alternatives) - log_sum(nulls)


def _half_width(n: int, squares: float, noise: Noise | None, target: float) -> float:
    """How far from zero n differences' mean must lie for two-sided log evidence of `target`; it only grows outwards."""

    def reached(distance: float) -> bool:
        return log_evidence(Moments(n, distance, squares), noise, None) >= target

    if n == 0:
        return math.inf

    sd, df = _parts(noise)
    low, high = 0.0, math.sqrt((df * sd**2 + squares) / max(df + n - 1.0, 1.0) / n)
    limit = 1e9 * high
    while not reached(high) and high > 0.0:
        low, high = high, 2.0 * high
        if high > limit:
            return math.inf

    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if reached(middle) else (middle, high)

    return high


def _log_student(df: float, t: float) -> float:
    """log P(T < t) of Student's t; far out, where the probability underflows, by its leading term."""
    below = probability(df, t)
    if below > 1e-290:
        return math.log(below)

    x = df / (df + t**2)
    log_beta = math.lgamma(0.5 * df) + math.lgamma(0.5) - math.lgamma(0.5 * df + 0.5)
    return 0.5 * df * math.log(x) - 0.5 * math.log1p(-x) - math.log(df) - log_beta


def _parts(noise: Noise | None) -> tuple[float, float]:
    """Deviation and degrees of freedom; without noise the pairs alone tell of their scatter."""
    return (0.0, 0.0) if noise is None else (noise.sd, noise.df)


def log_sum(logs: Iterable[float]) -> float:
    """log of the sum of exponentials."""
    values = list(logs)
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))
