"""The true effect to expect behind an observed one: what is claimed was picked for being large, so it is less. Pure.

Empirical Bayes: the effects of the other experiments tell how effects are spread, as a histogram with a spike at zero,
fitted by marginal likelihood (Kiefer and Wolfowitz 1956; Stephens 2017, Biostatistics 18:2). It starts from
PRIOR_EXPERIMENTS imagined ones, so a young lab leans on those. A posterior mean needs no correction for when one
stopped or which experiment one looks at, as long as `others` holds them all and not only the successes, and as long as
the noise is right: where it is taken for too small, luck looks like a spread of effects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from agents.noise import Noise

EDGES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0)
"""Of the histogram's bins on either side of zero, in deviations of a pair."""

PRIOR_EXPERIMENTS = 1.0
"""How many experiments the imagined distribution counts as. If it were 2, half of them nulls, gains of half a deviation
would be expected too large by .04 more where luck has them claimed, and larger ones as they are (benchmarks.shrinkage).
"""

PRIOR_NULLS = 0.8
"""The share of the imagined experiments that do nothing; the others act with a scale of PRIOR_SIZES."""

PRIOR_SIZES = (0.5, 1.5, 4.0)

_STEPS = 40
_NORMAL = NormalDist()
_SIDE = [(low, high) for low, high in zip((0.0, *EDGES[:-1]), EDGES, strict=True)]
_BINS = [(-high, -low) for low, high in reversed(_SIDE)] + _SIDE


def shrunk(effect: float, n: int, noise: Noise, others: Sequence[tuple[float, int]] = ()) -> float:
    """The expected true effect of an experiment whose n pairs have the mean `effect`.

    Args:
        others: mean and number of pairs of every other experiment of the class, claimed or not.

    In the metric's units, like everything here. An effect beyond all bins is left as it is.
    """
    if noise.sd == 0.0 or abs(effect) > EDGES[-1] * noise.sd:
        return effect

    own = _parts(effect / noise.sd, n)
    weights = _fitted([_parts(mean / noise.sd, pairs) for mean, pairs in others])
    means = [0.0, *(_mean_within(effect / noise.sd, n, low, high) for low, high in _BINS)]
    posterior = [w * part for w, part in zip(weights, own, strict=True)]
    return noise.sd * math.fsum(p * m for p, m in zip(posterior, means, strict=True)) / math.fsum(posterior)


def _fitted(likelihoods: Sequence[Sequence[float]]) -> list[float]:
    """The likeliest shares of the spike and the bins, by expectation-maximization."""
    prior = _prior()
    weights = prior
    for _ in range(_STEPS if likelihoods else 0):
        counts = [PRIOR_EXPERIMENTS * share for share in prior]
        for parts in likelihoods:
            products = [w * part for w, part in zip(weights, parts, strict=True)]
            if total := math.fsum(products):
                counts = [count + product / total for count, product in zip(counts, products, strict=True)]

        all_counts = math.fsum(counts)
        weights = [count / all_counts for count in counts]

    return weights


def _parts(mean: float, n: int) -> list[float]:
    """The density of an observed mean, in deviations of a pair, given no effect, and given one within each bin."""
    root = math.sqrt(n)
    spike = root * _NORMAL.pdf(root * mean)
    return [
        spike,
        *((_NORMAL.cdf(root * (high - mean)) - _NORMAL.cdf(root * (low - mean))) / (high - low) for low, high in _BINS),
    ]


def _mean_within(mean: float, n: int, low: float, high: float) -> float:
    """The expected effect given that it lies in a bin."""
    root = math.sqrt(n)
    below, above = root * (low - mean), root * (high - mean)
    inside = _NORMAL.cdf(above) - _NORMAL.cdf(below)
    if inside < 1e-12:
        return min(max(mean, low), high)

    return mean + (_NORMAL.pdf(below) - _NORMAL.pdf(above)) / (root * inside)


def _prior() -> list[float]:
    """The shares of the imagined experiments: the spike, then the bins."""
    slabs = [NormalDist(0.0, size) for size in PRIOR_SIZES]
    bins = [math.fsum(slab.cdf(high) - slab.cdf(low) for slab in slabs) for low, high in _BINS]
    total = math.fsum(bins)
    return [PRIOR_NULLS, *((1.0 - PRIOR_NULLS) * share / total for share in bins)]
