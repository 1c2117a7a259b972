"""The noise of a class of comparisons: what a pair's difference scatters by, pooled over earlier experiments.

Smyth's model of many variances (2004, Statistical Applications in Genetics and Molecular Biology 3:3): every experiment
has its own, drawn about the class's, sigma_j^2 ~ sd^2 df / chi^2(df). Where experiments scatter alike, df is large and
only says how well the deviation is known; where they differ it is small, and a new experiment has to show its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

_DOUBT = 2.0
"""What the log-likelihood must gain before experiments are taken to scatter unlike each other (about p = .02)."""

_GRID = [4.0 * 2.0 ** (step / 2.0) for step in range(17)]  # 4 to 1024


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The deviation of one pair's difference, and the degrees of freedom from which it is known."""

    sd: float
    df: float


def pool(groups: Sequence[Sequence[float]]) -> Noise | None:
    """The noise that experiments' differences show, one group an experiment; None if no group has two.

    Groups must not share runs: three baseline runs that twenty experiments are compared with are three, not sixty.
    """
    squares, dfs = [], []
    for group in groups:
        if len(group) > 1:
            mean = fmean(group)
            squares.append(math.fsum((value - mean) ** 2 for value in group))
            dfs.append(len(group) - 1)

    total = float(sum(dfs))
    if not total:
        return None

    pooled = math.fsum(squares) / total
    if pooled == 0.0:
        return Noise(sd=0.0, df=total)

    alike = math.fsum(_log_likelihood(d, s, math.inf, pooled) for d, s in zip(dfs, squares, strict=True))
    best = (alike + _DOUBT, math.inf, pooled)
    for prior_df in _GRID:
        variance = _variance(dfs, squares, prior_df, pooled)
        fit = math.fsum(_log_likelihood(d, s, prior_df, variance) for d, s in zip(dfs, squares, strict=True))
        best = max(best, (fit, prior_df, variance))

    _, prior_df, variance = best
    return Noise(sd=math.sqrt(variance), df=1.0 / (1.0 / prior_df + 1.0 / total))


def _log_likelihood(df: int, squares: float, prior_df: float, variance: float) -> float:
    """Of a sum of squares on df degrees of freedom; leaves out what depends on neither prior_df nor variance."""
    if math.isinf(prior_df):
        return -0.5 * (df * math.log(2.0 * variance) + squares / variance)

    scale = prior_df * variance
    return (
        math.lgamma(0.5 * (df + prior_df))
        - math.lgamma(0.5 * prior_df)
        - 0.5 * (df * math.log(scale) + (df + prior_df) * math.log1p(squares / scale))
    )


def _variance(dfs: Sequence[int], squares: Sequence[float], prior_df: float, start: float) -> float:
    """The likeliest variance of the class for a given prior_df, by fixed point: a mean in which outliers weigh less."""
    variance = start
    for _ in range(100):
        weights = [(d + prior_df) / (prior_df * variance + s) for d, s in zip(dfs, squares, strict=True)]
        weighed = math.fsum(w * s for w, s in zip(weights, squares, strict=True))
        before, variance = variance, variance * weighed / sum(dfs)
        if abs(variance - before) <= 1e-9 * before:
            break

    return variance
