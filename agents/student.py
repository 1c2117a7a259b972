"""Student's t distribution. scipy is imported when it is first asked for: the server starts without it."""

from __future__ import annotations


def probability(df: float, t: float) -> float:
    """P(T < t) with `df` degrees of freedom; 0.0 where it underflows."""
    from scipy.special import stdtr

    return float(stdtr(df, t))


def quantile(df: float, chance: float) -> float:
    """The t that T stays below with probability `chance`."""
    from scipy.special import stdtrit

    return float(stdtrit(df, chance))
